"use strict";
// Helpers of the DOM, formats and storage. Texts of data become text nodes or property values, never markup.

const byId = (id) => document.getElementById(id);

function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "class") node.className = value;
    else if (name.includes("-") || name === "role") node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

const readable = (name) => name.replaceAll("_", " ");
const figure = (value) => (value === null || value === undefined ? "–" : value.toFixed(3));
const percent = (fraction) => `${(100 * fraction).toFixed(fraction < 0.1 ? 1 : 0)} %`;

function bytesOf(base64) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let at = 0; at < text.length; at += 1) bytes[at] = text.charCodeAt(at);
  return bytes;
}

async function inflated(base64) {
  const stream = new Blob([bytesOf(base64)]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// Kept between visits; a browser may forbid it for files.
const storage = {
  get(name) { try { return localStorage.getItem(`tag2mask ${name}`); } catch { return null; } },
  set(name, value) { try { localStorage.setItem(`tag2mask ${name}`, value); } catch { /* then it is not kept */ } },
};
