// Figures of the gallery's images, and what is loaded when it is shown: blocks of pictures, pages of rows, provenance.

const report = JSON.parse(byId("report-data").textContent);
const images = report.images;
const positions = new Map(images.ids.map((id, at) => [id, at]));
const blocks = new Map();
const pending = new Map(); // name of a script → function that takes its data
const MAX_BLOCKS = 40; // in memory at a time, so that it does not grow with the data set

window.tag2mask = {
  block(number, items) { pending.get(number)?.(items); },
  rows(name, items) { pending.get(name)?.(items); },
  provenance(records) { pending.get("provenance")?.(records); },
  history(points) { pending.get("history")?.(points); },
};

function script(source, name) {
  return new Promise((resolve, reject) => {
    const tag = element("script", { src: source });
    pending.set(name, resolve);
    tag.addEventListener("error", () => reject(new Error(`${source} is missing beside this page`)));
    tag.addEventListener("load", () => tag.remove());
    document.head.append(tag);
  });
}

const numbered = (number) => String(number).padStart(4, "0");

// Data of a name from inside the page, else from a script beside it; `cache` holds the last `most` that were asked for.
function loaded(cache, most, elementId, source, name) {
  if (!cache.has(name)) {
    const inline = byId(elementId);
    cache.set(name, inline ? Promise.resolve(JSON.parse(inline.textContent)) : script(source, name));
    if (cache.size > most) cache.delete(cache.keys().next().value);
  }
  return cache.get(name);
}

function block(number) {
  const stem = `data-${numbered(number)}`;
  return loaded(blocks, MAX_BLOCKS, stem, `${stem}.js`, number);
}

async function picturesOf(at) {
  return (await block(Math.floor(at / images.per_block)))[at % images.per_block];
}

// Pictures of a method → its masks: name of the stage in the gallery → one value per pixel, row by row.
const unpackedMasks = new WeakMap();

function masksOf(methodPictures) {
  if (!unpackedMasks.has(methodPictures)) {
    unpackedMasks.set(methodPictures, inflated(methodPictures.maps).then((values) => {
      const size = values.length / methodPictures.present.length;
      const mask = (at) => values.subarray(at * size, (at + 1) * size);
      return Object.fromEntries(methodPictures.present.map((name, at) => [name, mask(at)]));
    }));
  }
  return unpackedMasks.get(methodPictures);
}

const unpackedTruths = new WeakMap();

function truthOf(pictures) {
  if (!pictures.truth) return Promise.resolve(null);
  if (!unpackedTruths.has(pictures)) unpackedTruths.set(pictures, inflated(pictures.truth));
  return unpackedTruths.get(pictures);
}

// score_maps and score_maps_val have one name in the gallery, since an image is of one split.
const nameOf = (stage) => stage.replace(/_val$/, "");
const inGallery = (method, at) => images.methods[method].kinds[at] >= 0;
const FIGURES = {
  miou: "mIoU", score: "score", method_agreement: "method agreement", score_and_agreement: "score and method agreement",
};

// Method agreement is of the image's last mask, whatever stage is shown. Without score_and_agreement, the score is used.
function valueOf(method, stage, figureName, at) {
  const source = figureName === "method_agreement" ? report.last_stages[images.splits[at]] : stage;
  const value = images.methods[method].stages[source]?.[figureName]?.[at] ?? null;
  return value === null && figureName === "score_and_agreement" ? valueOf(method, stage, "score", at) : value;
}

function changeOf(method, stage, at) {
  const now = valueOf(method, stage, "miou", at);
  const before = report.previous_stages[stage] ? valueOf(method, report.previous_stages[stage], "miou", at) : null;
  return now === null || before === null ? null : now - before;
}
