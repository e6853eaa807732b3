"""Vega, as vl-convert bundles it → the HTML template of `dvc plots show`, so that plots need no network.

DVC's own template loads three scripts from a content delivery network. `make setup` writes this one, and sets it in
.dvc/config.local.
"""

from __future__ import annotations

from pathlib import Path

import click
import vl_convert

VEGA_LITE = "5.20"  # DVC's templates are of version 5
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>tag2mask: plots</title>
{refresh_tag}
<style>
body { margin: 2rem; font-family: system-ui, sans-serif }
body > div { display: inline-block; margin: 0 2rem 2rem 0 }
</style>
<script>(() => {
%s
})();</script>
</head>
<body>
{plot_divs}
</body>
</html>
"""


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
def main(out: Path) -> None:
    """Writes the template to OUT."""
    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=VEGA_LITE).replace(
        "</script", "<\\/script"
    )
    out.write_text(PAGE % bundle, encoding="utf-8")


if __name__ == "__main__":
    main()
