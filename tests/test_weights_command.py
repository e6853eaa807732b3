"""`tag2mask weights`, without a network: the table, files fetched by hand, downloads from a folder, hostile files."""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from pipeline import runtime
from pipeline.core import plugins
from pipeline.jobs import known_weights, weights
from pipeline.jobs.known_weights import KNOWN, OWN, KnownWeights
from pipeline.nn.torchvision_guard import define_missing_operators
from pipeline.nn.weights import read_weights
from pipeline.refiners.segments.u2net import U2Net, folded
from stages.weights import main
from tests.toys import PROJECT

TINY = known_weights.named("deit_tiny_patch16_224")


@pytest.fixture(autouse=True)
def empty_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DVC_STAGE", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeiT-Tiny with random weights, as its authors' file has them."""
    torch.manual_seed(0)
    net = plugins.load("nn", "vit").create("deit_tiny_patch16_224", 224, drop_path=0.0).net
    path = tmp_path_factory.mktemp("tiny") / "deit_tiny.pth"
    torch.save({"model": {name: value.half() for name, value in net.state_dict().items()}}, path)
    return path


def call(*words: str) -> Result:
    return CliRunner().invoke(main, words)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---- the table ----


def test_every_initial_file_of_a_preset_is_in_the_table_by_the_path_that_the_preset_has() -> None:
    paths = set()
    for preset in (PROJECT / "presets").glob("*.yaml"):
        for run in yaml.safe_load(preset.read_text(encoding="utf-8"))["methods"].values():
            paths |= {run["init"], run["segmenter_init"]}
    named = {path for path in paths if path.startswith("data/weights/")}
    assert named and named <= {entry.path for entry in KNOWN}


def test_addresses_and_licences_are_those_that_timm_has() -> None:
    define_missing_operators()
    import timm

    checked = 0
    for entry in KNOWN:
        config = timm.get_pretrained_cfg(entry.name) if timm.is_model(entry.name) else None
        if config is None or entry.licence == OWN:
            continue
        hub = f"https://huggingface.co/{config.hf_hub_id}/resolve/main/model.safetensors"
        assert entry.url in (config.url, hub) and entry.licence.lower() == config.license
        assert entry.digest == "" or entry.url.removesuffix(".pth").endswith(entry.digest)
        checked += 1
    assert checked == 7


def test_the_weights_of_the_repository_have_the_checksums_of_the_table() -> None:
    own = [entry for entry in KNOWN if entry.licence == OWN]
    assert own and all(sha256(PROJECT / entry.path) in entry.at_hand for entry in own)


def test_list_names_file_licence_supervision_and_checksum() -> None:
    text = call("list").output
    for entry in KNOWN:
        assert entry.name in text and entry.path in text and entry.licence in text and entry.supervision in text
    assert "pixel masks of DUTS-TR (saliency)" in text and "sha256   unknown" in text


def test_the_page_about_weights_has_each_of_them_with_its_licence_and_no_pixel_masks_unsaid() -> None:
    page = (PROJECT / "docs" / "weights.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    for entry in KNOWN:
        row = next(row for row in rows if f"`{entry.name}`" in row)
        assert ("pixel masks" in entry.supervision) == ("pixel masks" in row)
        assert entry.licence == OWN or entry.licence.split()[0].rstrip("'s") in row


# ---- get ----


def test_a_file_that_was_fetched_by_hand_is_converted_keeps_its_precision_and_lies_where_presets_look(tiny: Path) -> None:
    result = call("get", TINY.name, "--from", str(tiny))
    assert result.exit_code == 0, result.output
    target = Path("data/weights/deit_tiny_patch16_224.safetensors")
    assert sha256(target) in result.output and list(target.parent.iterdir()) == [target]
    expected = torch.load(tiny, weights_only=True)["model"]
    for name, value in load_file(target).items():
        assert value.dtype == torch.float16 and torch.equal(value, expected[name])
    before = target.stat().st_mtime_ns
    assert call("get", TINY.name).exit_code == 0 and target.stat().st_mtime_ns == before  # it is there: no network


def test_without_a_network_one_error_says_what_to_fetch_and_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = replace(TINY, url=f"file://{Path.cwd()}/nowhere.pth")
    monkeypatch.setattr(known_weights, "KNOWN", (entry,))
    result = call("get", entry.name)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert f"Fetch {entry.url} on a machine with network" in result.output
    assert f"tag2mask weights get {entry.name} --from FILE" in result.output and not list(Path("data/weights").iterdir())


def fetched(entry: KnownWeights) -> Path:
    return weights.get(entry, None, runtime)[0]


def test_a_download_is_checked_by_its_checksum_converted_and_leaves_nothing_else(tiny: Path) -> None:
    entry = replace(TINY, url=tiny.as_uri(), digest=sha256(tiny)[:8])
    with pytest.raises(ValueError, match=f"sha256 {sha256(tiny)}, expected is a1311bcf"):
        fetched(replace(entry, digest="a1311bcf"))
    assert not list(Path("data/weights").iterdir())
    path = fetched(entry)
    assert path == Path(TINY.path) and list(path.parent.iterdir()) == [path]


def test_what_has_no_address_names_the_page_of_its_authors() -> None:
    result = call("get", "mit_b1")
    assert (
        result.exit_code == 1 and "https://github.com/NVlabs/SegFormer" in result.output and "--from FILE" in result.output
    )


def test_unknown_names_and_files_are_refused_with_the_choices() -> None:
    assert "there are deit_tiny_patch16_224, " in call("get", "deit_huge").output
    assert "--from: there is no file x.pth" in call("get", TINY.name, "--from", "x.pth").output
    assert "git checkout data/weights/scenes_vit" in call("get", "scenes_vit").output


def test_a_file_of_another_network_is_refused_and_nothing_is_left(tiny: Path) -> None:
    result = call("get", "deit_small_patch16_224", "--from", str(tiny))
    assert result.exit_code == 1 and "is not deit_small_patch16_224" in result.output
    assert f"`tag2mask weights check {tiny}`" in result.output and not list(Path("data/weights").iterdir())


def test_u2nets_published_file_becomes_the_folded_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    published, layers = {}, U2Net("u2netp").state_dict()
    for name, value in layers.items():
        layer, _, part = name.rpartition(".")
        if ".rebnconv" not in name:
            published[name] = value
            continue
        published[f"{layer}.conv_s1.{part}"] = value
        if part == "bias":
            norm = {
                "weight": 1 + torch.rand(len(value)),
                "bias": torch.randn(len(value)),
                "num_batches_tracked": torch.tensor(9),
            }
            norm |= {"running_mean": torch.randn(len(value)), "running_var": 0.5 + torch.rand(len(value))}
            published |= {f"{layer}.bn_s1.{key}": tensor for key, tensor in norm.items()}
    torch.save(published, tmp_path / "u2netp.pth")
    result = call("get", "u2netp", "--from", "u2netp.pth")
    assert result.exit_code == 0 and load_file("data/weights/u2netp.safetensors").keys() == layers.keys()
    ours = folded(published)
    layer, maps = "stage2.rebnconv1", torch.rand(1, 64, 5, 5)
    conv = torch.nn.functional.conv2d(
        maps, *(published[f"{layer}.conv_s1.{part}"] for part in ("weight", "bias")), padding=1
    )
    norm = [published[f"{layer}.bn_s1.{key}"] for key in ("running_mean", "running_var", "weight", "bias")]
    expected = torch.nn.functional.batch_norm(conv, *norm)
    actual = torch.nn.functional.conv2d(maps, ours[f"{layer}.weight"], ours[f"{layer}.bias"], padding=1)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


# ---- check, and the loader of training ----


def test_check_says_what_a_file_fits_in_the_words_of_params(tiny: Path) -> None:
    result = call("check", str(tiny))
    assert result.exit_code == 0 and "fits backbone vit, architecture deit_tiny_patch16_224" in result.output
    assert "float16" in result.output and sha256(tiny) in result.output and "deit_small" not in result.output
    for entry in KNOWN:
        if entry.licence == OWN:
            text = call("check", str(PROJECT / entry.path)).output
            assert f"fits backbone {entry.family}, architecture {entry.architecture}\n" in text


def test_check_says_why_a_file_does_not_fit_an_architecture(tiny: Path) -> None:
    result = call("check", str(tiny), "--backbone", "vit", "--architecture", "deit_small_patch16_224")
    assert result.exit_code == 1 and "(192,) instead of (384,)" in result.output
    assert "go together" in call("check", str(tiny), "--backbone", "vit").output


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cut.safetensors", "is no whole safetensors file"),
        ("pickle.pth", "pickled code"),
        ("pickle.safetensors", "is no whole safetensors file"),
        ("cut.pth", "is no whole file of torch.save"),
        ("empty.pth", "is no whole file of torch.save"),
        ("list.pth", "holds no tensors"),
        ("nan.safetensors", "1 tensors have values that are not finite, a among them"),
        ("words.txt", "allowed are files that end in"),
        ("noise.onnx", "ONNX"),
    ],
)
def test_a_hostile_or_broken_file_is_an_error_and_never_run(name: str, words: str, tiny: Path) -> None:
    save_file({"a": torch.tensor([1.0, float("nan")])}, "nan.safetensors")
    Path("cut.safetensors").write_bytes(Path("nan.safetensors").read_bytes()[:-3])
    Path("cut.pth").write_bytes(tiny.read_bytes()[:5000])
    Path("empty.pth").write_bytes(b"")
    for hostile in ("pickle.pth", "pickle.safetensors"):
        Path(hostile).write_bytes(pickle.dumps(Bomb()))
    torch.save([torch.zeros(3)], "list.pth")
    Path("words.txt").write_text("words")
    Path("noise.onnx").write_bytes(b"\x08\x07noise")
    result = call("check", name)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit) and words in result.output, result.output
    assert not Path("exploded").exists()
    if Path(name).suffix in (".pth", ".safetensors") and name != "nan.safetensors":
        with pytest.raises(ValueError, match=r"holds no tensors|tag2mask weights check"):
            read_weights(Path(name))
        assert call("get", TINY.name, "--from", name).exit_code == 1 and not Path(TINY.path).exists()


class Bomb:
    """Its unpickling would write a file."""

    def __reduce__(self) -> tuple[object, tuple[str, bytes]]:
        return Path.write_bytes, (Path("exploded"), b"")  # type: ignore[return-value]


def test_weights_with_values_that_are_not_finite_are_never_put_in_place(tiny: Path) -> None:
    tensors = torch.load(tiny, weights_only=True)["model"]
    tensors["norm.bias"][3] = np.nan
    torch.save(tensors, "broken.pth")
    result = call("get", TINY.name, "--from", "broken.pth")
    assert result.exit_code == 1 and "not finite" in result.output and not Path(TINY.path).exists()
