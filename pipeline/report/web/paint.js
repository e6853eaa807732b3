// Picture of an image: the photograph, and over it a score map, a mask, the ground truth or an error map.

const IGNORE = 255;
const CREAM = [224, 224, 192];
const ERRORS = {
  missed: { colour: [86, 180, 233], name: "missed: background in the mask, a class in the ground truth" },
  extra: { colour: [230, 159, 0], name: "extra: a class in the mask, background in the ground truth" },
  wrong: { colour: [204, 60, 130], name: "wrong class" },
  ignored: { colour: [140, 140, 140], name: "255 in the ground truth or in the mask" },
};
const colours = report.colours.map((text) => [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16)));

// Layers that can be chosen for images of one split, in the order of the keys 1, 2, 3 …
function layersOf(split) {
  const stages = report.stages.filter((stage) => report.splits[stage] === split).map(nameOf);
  const truth = images.truth.some(Boolean) ? ["truth", "error"] : [];
  return ["photograph", "scores", "confidence", ...stages, ...truth];
}

const LAYER_NAMES = {
  photograph: "image", scores: "scores", score_maps: "seed mask",
  pseudo_masks: "pseudo-mask", predictions: "prediction", truth: "truth", error: "error map",
};
const layerName = (layer) => LAYER_NAMES[layer] ?? readable(layer);

function setPixel(pixels, at, colour, alpha) {
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
      if ((column + Math.floor(at / width)) % 4 < 2) setPixel(pixels, at, CREAM, 230);
      continue;
    }
    const border = (column > 0 && values[at - 1] !== value) || (column < width - 1 && values[at + 1] !== value)
      || (at >= width && values[at - width] !== value) || (at + width < values.length && values[at + width] !== value);
    const colour = colours[value] ?? CREAM;
    setPixel(pixels, at, border ? lighter(colour) : colour, border ? 255 : 220);
  }
}

// Kind of error of a pixel, a key of ERRORS; null where the mask is correct.
function errorOf(truth, value) {
  if (truth === IGNORE || value === IGNORE) return "ignored";
  if (truth === value) return null;
  if (truth === 0) return "extra";
  return value === 0 ? "missed" : "wrong";
}

function paintErrors(pixels, truth, values, width) {
  for (let at = 0; at < values.length; at += 1) {
    const kind = errorOf(truth[at], values[at]);
    if (kind === null) { pixels[4 * at + 3] = DIMMED; continue; }
    const striped = kind === "ignored" && ((at % width) + Math.floor(at / width)) % 4 >= 2;
    if (!striped) setPixel(pixels, at, ERRORS[kind].colour, 255);
  }
}

// A grey JPEG, smaller than the thumbnail → one value 0..255 per pixel of the thumbnail.
async function greyOf(base64, width, height) {
  const grey = new Image();
  grey.src = `data:image/jpeg;base64,${base64}`;
  await grey.decode();
  const canvas = element("canvas", { width, height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  context.drawImage(grey, 0, 0, width, height);
  const rgba = context.getImageData(0, 0, width, height).data;
  return Uint8Array.from({ length: width * height }, (_, at) => rgba[4 * at]);
}

// From dark violet over orange to pale yellow; low scores are more transparent.
const HEAT = [[20, 11, 53], [101, 21, 110], [187, 55, 84], [243, 120, 25], [252, 255, 164]];

function paintScores(pixels, scores) {
  for (let at = 0; at < scores.length; at += 1) {
    const position = scores[at] / 255 * (HEAT.length - 1);
    const lower = Math.min(HEAT.length - 2, Math.floor(position));
    const weight = position - lower;
    const colour = HEAT[lower].map((value, channel) => value + weight * (HEAT[lower + 1][channel] - value));
    setPixel(pixels, at, colour, 110 + 0.57 * scores[at]);
  }
}

// The less sure a pixel is, the more of it is covered.
const UNSURE = [240, 120, 20];

function paintConfidence(pixels, confidence) {
  for (let at = 0; at < confidence.length; at += 1) setPixel(pixels, at, UNSURE, 255 - confidence[at]);
}

// Layer over the photograph: { kind, values } or null. kind: "mask" (classes), "scores" and "confidence" (0..255), "error"
// (has truth).
async function layerOf(pictures, at, method, layer, stage) {
  const [height, width] = images.sizes[at];
  if (layer === "photograph") return null;
  if (layer === "truth") return { kind: "mask", values: await truthOf(pictures) };
  const methodPictures = pictures.methods[method];
  if (!methodPictures) return null;
  if (layer === "scores" || layer === "confidence") {
    return { kind: layer, values: await greyOf(methodPictures[layer], width, height) };
  }
  const masks = await masksOf(methodPictures);
  if (layer === "error") return { kind: "error", values: masks[nameOf(stage)], truth: await truthOf(pictures) };
  return { kind: "mask", values: masks[layer] };
}

function tagNames(at) {
  const tags = images.tags[at];
  return tags === null ? "untagged" : tags.map((tag) => report.classes[tag + 1]).join(", ") || "no class";
}

// An element with the picture; its `filled` resolves to the layer, or null, when the block of pictures is loaded and drawn.
function picture(at, method, { layer, stage, opacity }, label) {
  const [height, width] = images.sizes[at];
  const alt = `${images.ids[at]}: photograph, tags: ${tagNames(at)}`;
  const photograph = element("img", { alt, width, height, draggable: false });
  const overlay = element("canvas", { width, height, role: "img", "aria-label": `${layerName(layer)} of ${method}` });
  overlay.style.opacity = String(opacity / 100);
  overlay.classList.toggle("sharp", !["scores", "confidence"].includes(layer));
  const caption = label ? element("span", { class: "method-name" }, label) : null;
  const stack = element("div", { class: "stack" }, photograph, overlay, caption);
  const showMessage = (text) => stack.append(element("span", { class: "message" }, text));
  stack.filled = (async () => {
    const pictures = await picturesOf(at);
    photograph.src = `data:image/webp;base64,${pictures.photograph}`;
    const ofMethod = !["photograph", "truth"].includes(layer);
    if (ofMethod && !inGallery(method, at)) { showMessage(`not in the gallery of ${method}`); return null; }
    const content = await layerOf(pictures, at, method, layer, stage);
    if (!content?.values || (content.kind === "error" && !content.truth)) {
      const needsTruth = layer === "error" || layer === "truth";
      if (layer !== "photograph") showMessage(needsTruth ? "no ground truth" : `no ${layerName(layer)}`);
      return null;
    }
    const context = overlay.getContext("2d");
    const drawn = context.createImageData(width, height);
    if (content.kind === "mask") paintMask(drawn.data, content.values, width);
    else if (content.kind === "scores") paintScores(drawn.data, content.values);
    else if (content.kind === "confidence") paintConfidence(drawn.data, content.values);
    else paintErrors(drawn.data, content.truth, content.values, width);
    context.putImageData(drawn, 0, 0);
    return content;
  })().catch((error) => { showMessage(error.message); return null; });
  return stack;
}

function legendItem(colour, name, fraction) {
  const swatch = element("i", { class: "swatch", style: `background: ${colour}` });
  return element("li", {}, swatch, element("span", {}, name), fraction === undefined ? null : element("span", {}, percent(fraction)));
}

// Legend of a layer. values: [{ value, fraction of pixels }] of a mask; without it all classes are listed.
function legendItems(layer, values) {
  const css = (colour) => `rgb(${colour.join(" ")})`;
  if (layer === "error") return Object.values(ERRORS).map(({ colour, name }) => legendItem(css(colour), name));
  if (layer === "scores") return [0, 2, 4].map((at) => legendItem(css(HEAT[at]), ["score 0", "0.5", "1"][at / 2]));
  if (layer === "confidence") {
    return [1, 0.5, 0].map((cover) => legendItem(`rgb(${UNSURE.join(" ")} / ${cover})`, `confidence ${1 - cover}`));
  }
  if (layer === "photograph") return [];
  const ignored = (fraction) => legendItem(css(CREAM), "255, ignored", fraction);
  const classItem = (value, fraction) => legendItem(report.colours[value], report.classes[value], fraction);
  if (!values) return [...report.classes.slice(1).map((_, at) => classItem(at + 1)), ignored()];
  return values.map(({ value, fraction }) => (value === IGNORE ? ignored(fraction) : classItem(value, fraction)));
}
