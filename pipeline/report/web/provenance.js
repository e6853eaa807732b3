// What differs from run to run and lies beside the report: provenance of the stages, and figures over the history of git.

function provenanceTable(records) {
  const versions = [...new Set(records.flatMap((record) => Object.keys(record.versions ?? {})))].sort();
  const short = (text) => (text ?? "–").slice(0, 12);
  const head = [
    "stage", "seconds", "peak MiB", "peak MiB of the largest child process", "device", "GPUs", "engine",
    "workers", "loaders", "ranks", "python", ...versions,
    "params digest", "code digest",
  ];
  const rows = records.map((record) => [
    record.stage, record.seconds?.toFixed(1), record.peak_memory_mib, record.peak_memory_mib_largest_child, record.device,
    record.gpus?.join(", "), record.engine, record.workers, record.loaders, record.ranks, record.python, ...versions.map((name) => record.versions?.[name]),
    short(record.params_digest), short(record.code_digest),
  ]);
  const cell = (value, at) => element(at === 0 ? "th" : "td", at === 0 ? { scope: "row" } : {}, String(value ?? "–"));
  return element(
    "table", {}, element("thead", {}, element("tr", {}, ...head.map((name) => element("th", { scope: "col" }, name)))),
    element("tbody", {}, ...rows.map((row) => element("tr", {}, ...row.map(cell)))),
  );
}

byId("provenance-load").addEventListener("click", async () => {
  try {
    const records = await script("../provenance/provenance.js", "provenance");
    byId("provenance-table").replaceChildren(provenanceTable(records));
    byId("provenance-note").textContent = `${records.length} stages`;
  } catch {
    byId("provenance-note").textContent =
      "provenance/provenance.js is not there: this report was moved, or no stage was run here.";
  }
});

const SVG = document.createRange().createContextualFragment("<svg></svg>").firstChild.namespaceURI;

const LEAST_SPAN = 0.05; // that the height of a line stands for: a change in the third digit is none

// Figures of one stage over the commits, oldest first, as a line; null is skipped.
function lineOf(values) {
  const known = values.filter((value) => value !== null);
  const [low, high, width, height] = [Math.min(...known), Math.max(...known), 120, 28];
  const step = (width - 12) / Math.max(1, values.length - 1);
  const span = Math.max(high - low, LEAST_SPAN);
  const y = (value) => height / 2 - (height - 12) * ((value - (low + high) / 2) / span);
  const dots = values.flatMap((value, at) => (value === null ? [] : [[6 + at * step, y(value)]]));
  const svg = (tag, attributes) => {
    const node = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    return node;
  };
  const label = known.map(figure).join(" → ");
  const drawn = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": label });
  drawn.append(
    svg("polyline", { class: "line", points: dots.map(([x, at]) => `${x.toFixed(1)},${at.toFixed(1)}`).join(" ") }),
    ...dots.map(([x, at]) => svg("circle", { class: "dot", cx: x.toFixed(1), cy: at.toFixed(1), r: 1.8 })),
  );
  return drawn;
}

const MAX_COMMITS = 20; // columns of the table of a run

// points: of one run, newest first. A row per stage: the line over all points, and the figures of the latest ones.
function historyTable(points) {
  const name = points.some((point) => Object.keys(point.miou).length) ? "miou" : "coverage";
  const stages = [...new Set(points.flatMap((point) => Object.keys(point[name])))];
  const position = (stage) => (report.stages.includes(stage) ? report.stages.indexOf(stage) : report.stages.length);
  const ordered = stages.sort((a, b) => position(a) - position(b));
  const heading = ({ commit, date, subject }) => element(
    "th", { scope: "col", title: subject }, commit.slice(0, 7) || "now", element("br"),
    element("small", {}, date || "not committed"),
  );
  const value = (point, stage) => point[name][stage] ?? null;
  const latest = points.slice(0, MAX_COMMITS);
  const row = (stage) => element(
    "tr", {}, element("th", { scope: "row" }, readable(stage)),
    element("td", { class: "left" }, lineOf(points.map((point) => value(point, stage)).reverse())),
    ...latest.map((point) => element("td", {}, figure(value(point, stage)))),
  );
  const head = element(
    "tr", {}, element("th", { scope: "col" }, name === "miou" ? "mIoU" : "coverage"),
    element("th", { scope: "col", class: "left" }, "oldest to newest"), ...latest.map(heading),
  );
  return element("table", { class: "tight" }, element("thead", {}, head), element("tbody", {}, ...ordered.map(row)));
}

byId("history-load").addEventListener("click", async () => {
  try {
    const runs = Object.entries(await script("../provenance/history.js", "history"));
    byId("history-tables").replaceChildren(...runs.filter(([, points]) => points.length).flatMap(([run, points]) => [
      element("h3", {}, run), element("div", { class: "scroll" }, historyTable(points)),
    ]));
    byId("history-note").textContent = "";
  } catch {
    byId("history-note").textContent =
      "provenance/history.js is not there: this report was moved, or its metrics are in no git repository.";
  }
});
