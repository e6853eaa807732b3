// One picture: the photograph, and over it a score map, a mask, the truth or an error map.

const IGNORE = 255;
const CREAM = [224, 224, 192];
const ERRORS = {
  missed: { colour: [86, 180, 233], words: "missed: background here, a class in truth" },
  extra: { colour: [230, 159, 0], words: "extra: a class here, background in truth" },
  wrong: { colour: [204, 60, 130], words: "wrong class" },
  open: { colour: [140, 140, 140], words: "255: not counted in truth, or left open by the mask" },
};
const colours = facts.colours.map((text) => [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16)));

// Layers that can be chosen for images of one split, in the order of the keys 1, 2, 3 …
function layersOf(split) {
  const stages = facts.stages.filter((stage) => facts.splits[stage] === split).map(nameOf);
  const truth = images.truth.some(Boolean) ? ["truth", "error"] : [];
  return ["photograph", "scores", ...stages, ...truth];
}

const LAYER_NAMES = { photograph: "image", scores: "scores", score_maps: "score map", pseudo_masks: "pseudo-mask", predictions: "prediction", error: "error map" };
const layerName = (layer) => LAYER_NAMES[layer] ?? spoken(layer);

function put(pixels, at, colour, alpha) {
  pixels[4 * at] = colour[0];
  pixels[4 * at + 1] = colour[1];
  pixels[4 * at + 2] = colour[2];
  pixels[4 * at + 3] = alpha;
}

const DIMMED = 150; // of 255: how dark the photograph gets where the mask says background
const lighter = (colour) => colour.map((value) => 128 + value / 2);

// Classes with lighter borders, since colours like navy vanish on a photograph; background dims it, 255 is striped.
function paintMask(pixels, values, width) {
  for (let at = 0; at < values.length; at += 1) {
    const value = values[at];
    const column = at % width;
    if (value === 0) { pixels[4 * at + 3] = DIMMED; continue; }
    if (value === IGNORE) {
      if ((column + Math.floor(at / width)) % 4 < 2) put(pixels, at, CREAM, 230);
      continue;
    }
    const border = (column > 0 && values[at - 1] !== value) || (column < width - 1 && values[at + 1] !== value)
      || (at >= width && values[at - width] !== value) || (at + width < values.length && values[at + width] !== value);
    const colour = colours[value] ?? CREAM;
    put(pixels, at, border ? lighter(colour) : colour, border ? 255 : 220);
  }
}

// What kind of error a pixel is, or null where it is right.
function errorOf(truth, value) {
  if (truth === IGNORE || value === IGNORE) return "open";
  if (truth === value) return null;
  if (truth === 0) return "extra";
  return value === 0 ? "missed" : "wrong";
}

function paintErrors(pixels, truth, values, width) {
  for (let at = 0; at < values.length; at += 1) {
    const kind = errorOf(truth[at], values[at]);
    if (kind === null) { pixels[4 * at + 3] = DIMMED; continue; }
    const striped = kind === "open" && ((at % width) + Math.floor(at / width)) % 4 >= 2;
    if (!striped) put(pixels, at, ERRORS[kind].colour, 255);
  }
}

async function scoresOf(of, width, height) {
  const grey = new Image();
  grey.src = `data:image/jpeg;base64,${of.scores}`;
  await grey.decode();
  const canvas = element("canvas", { width, height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  context.drawImage(grey, 0, 0, width, height);
  const read = context.getImageData(0, 0, width, height).data;
  return Uint8Array.from({ length: width * height }, (_, at) => read[4 * at]);
}

// From nothing over violet and orange to pale yellow; what scores little stays clear.
const HEAT = [[20, 11, 53], [101, 21, 110], [187, 55, 84], [243, 120, 25], [252, 255, 164]];

function paintScores(pixels, scores) {
  for (let at = 0; at < scores.length; at += 1) {
    const share = scores[at] / 255 * (HEAT.length - 1);
    const below = Math.min(HEAT.length - 2, Math.floor(share));
    const part = share - below;
    put(pixels, at, HEAT[below].map((value, channel) => value + part * (HEAT[below + 1][channel] - value)), 110 + 0.57 * scores[at]);
  }
}

// What lies over the photograph: { values, kind } or null; kind says how to read a value.
async function layerOf(pictures, at, method, layer, stage) {
  const [height, width] = images.sizes[at];
  if (layer === "photograph") return null;
  if (layer === "truth") return { kind: "mask", values: await truthOf(pictures) };
  const of = pictures.methods[method];
  if (!of) return null;
  if (layer === "scores") return { kind: "scores", values: await scoresOf(of, width, height) };
  const masks = await masksOf(of);
  if (layer === "error") return { kind: "error", values: masks[nameOf(stage)], truth: await truthOf(pictures) };
  return { kind: "mask", values: masks[layer] };
}

// An element with the picture; it fills itself when its block has arrived.
function picture(at, method, { layer, stage, opacity }, label) {
  const [height, width] = images.sizes[at];
  const tags = images.tags[at] === null ? "untagged" : images.tags[at].map((tag) => facts.classes[tag + 1]).join(", ") || "no class";
  const photograph = element("img", { alt: `${images.ids[at]}: photograph, tagged ${tags}`, width, height, draggable: false });
  const over = element("canvas", { width, height, role: "img", "aria-label": `${layerName(layer)} of ${method}` });
  over.style.opacity = String(opacity / 100);
  over.classList.toggle("sharp", layer !== "scores");
  const stack = element("div", { class: "stack" }, photograph, over, label ? element("span", { class: "who" }, label) : null);
  const tell = (words) => stack.append(element("span", { class: "told" }, words));
  stack.filled = (async () => {
    const pictures = await picturesOf(at);
    photograph.src = `data:image/webp;base64,${pictures.photograph}`;
    const needed = !["photograph", "truth"].includes(layer);
    if (needed && !inGallery(method, at)) { tell(`${method} did not keep this image`); return null; }
    const found = await layerOf(pictures, at, method, layer, stage);
    if (!found?.values || (found.kind === "error" && !found.truth)) {
      if (layer !== "photograph") tell(layer === "error" || layer === "truth" ? "no truth" : `no ${layerName(layer)}`);
      return null;
    }
    const context = over.getContext("2d");
    const drawn = context.createImageData(width, height);
    if (found.kind === "mask") paintMask(drawn.data, found.values, width);
    else if (found.kind === "scores") paintScores(drawn.data, found.values);
    else paintErrors(drawn.data, found.truth, found.values, width);
    context.putImageData(drawn, 0, 0);
    return found;
  })().catch((error) => { tell(error.message); return null; });
  return stack;
}

function legendItems(layer, values) {
  const item = (colour, words, more) => element("li", {}, element("i", { class: "swatch", style: `background: ${colour}` }), element("span", {}, words), more ?? null);
  const css = (colour) => `rgb(${colour.join(" ")})`;
  if (layer === "error") return Object.values(ERRORS).map(({ colour, words }) => item(css(colour), words));
  if (layer === "scores") return [0, 2, 4].map((at) => item(css(HEAT[at]), ["score 0", "0.5", "1"][at / 2]));
  if (layer === "photograph") return [];
  const shown = values ?? facts.classes.slice(1).map((_, at) => ({ value: at + 1 }));
  return [
    ...shown.map(({ value, share }) => item(value === IGNORE ? css(CREAM) : facts.colours[value], value === IGNORE ? "255" : facts.classes[value], share === undefined ? null : element("span", {}, percent(share)))),
    ...(values ? [] : [item(css(CREAM), "255, left open")]),
  ];
}
