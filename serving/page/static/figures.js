// SPDX-License-Identifier: Apache-2.0
// Numbers as bars: stages of a request, what an evaluation measured, what the server counts.

import { bar, byId, make, makeSvg } from "./dom.js";

const milliseconds = (value) => (value === null ? "–" : `${value < 10 ? value.toFixed(1) : value.toFixed(0)} ms`);

function rows(figures) {
  return make(
    "div",
    { className: "figure" },
    ...figures.flatMap(({ name, drawn, text }) => [
      make("span", { className: "name" }, name),
      drawn,
      make("span", { className: "number" }, text),
    ]),
  );
}

export function showStages(stages) {
  const entries = Object.entries(stages);
  const total = entries.reduce((sum, [, value]) => sum + value, 0);
  const figures = entries.map(([name, value]) => ({ name, drawn: bar(value / total), text: milliseconds(value) }));
  byId("stages").replaceChildren(rows([...figures, { name: "together", drawn: make("span"), text: milliseconds(total) }]));
}

/** An interval on an axis that all of a plot share, and zero on it. */
function whisker({ value, low, high }, least, most) {
  const x = (at) => `${(4 + (92 * (at - least)) / (most - least)).toFixed(2)}%`;
  return makeSvg(
    "svg",
    { class: "whisker", "aria-hidden": "true" },
    makeSvg("line", { class: "zero", x1: x(0), x2: x(0), y1: 0, y2: 14 }),
    makeSvg("line", { x1: x(low), x2: x(high), y1: 7, y2: 7 }),
    makeSvg("circle", { cx: x(value), cy: 7, r: 4 }),
  );
}

function plot({ title, bars }) {
  const most = Math.max(1e-9, ...bars.map(({ value, high }) => high ?? value));
  const least = Math.min(0, ...bars.map(({ value, low }) => low ?? value));
  const figures = bars.map((one) => ({
    name: one.name,
    drawn: one.low === null ? bar(one.value / most) : whisker(one, least, most),
    text: one.value.toFixed(4),
  }));
  const wide = bars.some(({ low }) => low !== null);
  return make("div", { className: wide ? "wide" : "" }, make("h3", {}, title), rows(figures));
}

export function showReport(report) {
  const plots = report.plots.map(plot);
  const shown = plots.length ? make("div", { className: "plots" }, ...plots) : make("p", { className: "muted" }, "This bundle holds no figures.");
  byId("report").replaceChildren(shown);
}

export function showLive({ rate, p50, p99, rejected, flagged, waiting }) {
  const cards = [
    ["requests/s", rate === null ? "–" : rate.toFixed(1)],
    ["p50, up to", milliseconds(p50)],
    ["p99, up to", milliseconds(p99)],
    ["waiting", String(waiting)],
    ["rejected", String(rejected)],
    ...flagged.map(([flag, count]) => [flag.replaceAll("_", " "), String(count)]),
  ];
  byId("live").replaceChildren(
    make("dl", { className: "cards" }, ...cards.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value)))),
    make("p", { className: "muted" }, "Lists of the API and of this page. Rejections and flags since the start."),
  );
}
