// The facts of all images, and the blocks of pictures that are loaded when something of them is shown.

const facts = JSON.parse(byId("facts").textContent);
const images = facts.images;
const positions = new Map(images.ids.map((id, at) => [id, at]));
const blocks = new Map();
const arrived = new Map();
const MOST_BLOCKS = 40; // kept at a time, so that memory does not grow with the data set

window.tag2mask = { block(number, items) { arrived.get(number)?.(items); }, provenance(found) { arrived.get("provenance")?.(found); } };

function script(source, name) {
  return new Promise((resolve, reject) => {
    const tag = element("script", { src: source });
    arrived.set(name, resolve);
    tag.addEventListener("error", () => reject(new Error(`${source} is missing beside this page`)));
    tag.addEventListener("load", () => tag.remove());
    document.head.append(tag);
  });
}

function block(number) {
  if (!blocks.has(number)) {
    const inside = byId(`block-${number}`);
    const name = `data-${String(number).padStart(4, "0")}.js`;
    blocks.set(number, inside ? Promise.resolve(JSON.parse(inside.textContent)) : script(name, number));
    if (blocks.size > MOST_BLOCKS) blocks.delete(blocks.keys().next().value);
  }
  return blocks.get(number);
}

async function picturesOf(at) {
  return (await block(Math.floor(at / images.per_block)))[at % images.per_block];
}

// Masks of a method: name of the stage in the gallery → one value per pixel, row by row.
const unpacked = new WeakMap();

function masksOf(of) {
  if (!unpacked.has(of)) {
    unpacked.set(of, inflated(of.maps).then((all) => {
      const size = all.length / of.present.length;
      return Object.fromEntries(of.present.map((name, at) => [name, all.subarray(at * size, (at + 1) * size)]));
    }));
  }
  return unpacked.get(of);
}

const truths = new WeakMap();

function truthOf(pictures) {
  if (!pictures.truth) return Promise.resolve(null);
  if (!truths.has(pictures)) truths.set(pictures, inflated(pictures.truth));
  return truths.get(pictures);
}

// Score and score_maps_val have one name in the gallery: an image is of one split.
const nameOf = (stage) => stage.replace(/_val$/, "");
const inGallery = (method, at) => images.methods[method].kinds[at] >= 0;
const FIGURES = { miou: "IoU", score: "score", method_agreement: "method agreement", both: "score and method agreement" };

// Method agreement is of the image's last mask, whatever stage is shown. Where there is no mean of it and the score, the score counts.
function valueOf(method, stage, what, at) {
  const from = what === "method_agreement" ? facts.last[images.splits[at]] : stage;
  const found = images.methods[method].stages[from]?.[what]?.[at] ?? null;
  return found === null && what === "both" ? valueOf(method, stage, "score", at) : found;
}

function changeOf(method, stage, at) {
  const now = valueOf(method, stage, "miou", at);
  const before = facts.steps[stage] ? valueOf(method, facts.steps[stage], "miou", at) : null;
  return now === null || before === null ? null : now - before;
}
