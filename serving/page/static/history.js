// SPDX-License-Identifier: Apache-2.0
// The history: shown with the newest event first, kept as the models read it, with the oldest first.

import { bar, byId, make, named, signed } from "./dom.js";

const REASONS = 3;
const list = byId("history");

/** The places of the events that raise a score most, the strongest first. */
export const strongest = (effects) =>
  [...effects.keys()]
    .filter((j) => effects[j] > 0)
    .sort((a, b) => effects[b] - effects[a])
    .slice(0, REASONS);

/**
 * Show the events.
 * @param events {item_id, title, added}, oldest first
 * @param change called with the events in another order or number, what was done, the tool that did it, and the place to go on from
 */
export function showHistory(events, change) {
  const last = events.length - 1;
  const moved = (from, to) => {
    const next = [...events];
    next.splice(to, 0, ...next.splice(from, 1));
    return next;
  };
  const row = (event, i) => {
    const tool = (name, sign, said, disabled, next, place) =>
      make("button", {
        type: "button",
        className: name,
        textContent: sign,
        disabled,
        "aria-label": `${said}: ${named(event)}`,
        onclick: () => change(next(), `${said}: ${named(event)}`, name, place),
      });
    const tools = [
      tool("later", "↑", "Later", i === last, () => moved(i, i + 1), last - i - 1),
      tool("earlier", "↓", "Earlier", i === 0, () => moved(i, i - 1), last - i + 1),
      tool("remove", "✕", "Remove", false, () => events.filter((_, j) => j !== i), last - i),
    ];
    return make(
      "li",
      { className: event.added ? "added" : "", "data-item": event.item_id },
      make("span", { className: "title" }, named(event)),
      make("span", { className: "tools" }, ...tools),
      make("div", { className: "effect" }),
    );
  };
  list.replaceChildren(...events.map(row).reverse());
}

/** Show at each event what it does to one item; null shows nothing. */
export function showEffects(effects) {
  const rows = [...list.children];
  // A list that has not caught up with the history says nothing about it.
  if (effects?.length !== rows.length) effects = null;
  const largest = Math.max(1e-9, ...(effects ?? []).map(Math.abs));
  const causes = strongest(effects ?? []);
  rows.forEach((row, i) => {
    const place = rows.length - 1 - i;
    const effect = effects?.[place];
    row.classList.toggle("cause", causes.includes(place));
    const shown = effect === undefined ? [] : [bar(Math.abs(effect) / largest, effect < 0), make("span", { className: "number" }, signed(effect))];
    row.querySelector(".effect").replaceChildren(...shown);
  });
}

/** Put the focus back to where it was before the history was shown anew. */
export function refocus(place, tool) {
  const row = list.children[Math.min(place, list.children.length - 1)];
  const wanted = row?.querySelector(`.${tool}:not(:disabled)`) ?? row?.querySelector("button:not(:disabled)") ?? byId("add");
  wanted.focus();
}
