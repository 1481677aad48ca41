// SPDX-License-Identifier: Apache-2.0
// Recommended lists: one, or two beside each other. What moved against an earlier or another list is marked.

import { bar, byId, make, named, signed } from "./dom.js";
import { showEffects, strongest } from "./history.js";

const columns = byId("columns");

/** Where an item came from: null where it did not move or there is nothing to compare with. */
export function movement(item, place, before) {
  if (before === null) return null;
  const was = before.indexOf(item.item_id);
  if (was < 0) return { text: "new", said: "new" };
  if (was === place) return null;
  const by = Math.abs(was - place);
  return was > place ? { text: `▲ ${by}`, said: `up by ${by}` } : { text: `▼ ${by}`, said: `down by ${by}` };
}

function reasonsOf(item, history, largest) {
  return strongest(item.effects).map((j) =>
    make(
      "span",
      { className: "reason" },
      make("span", { className: "name" }, named(history[j])),
      bar(item.effects[j] / largest),
      make("span", { className: "number" }, signed(item.effects[j])),
    ),
  );
}

function row(item, place, { history, largest, before }) {
  const moved = movement(item, place, before);
  const title = make("span", { className: "title" }, named(item));
  if (moved) title.append(make("span", { className: "moved", "aria-hidden": "true" }, moved.text), make("span", { className: "unseen" }, `, ${moved.said}`));
  const button = make(
    "button",
    { type: "button", className: "item", "aria-pressed": "false", "data-item": item.item_id },
    make("span", { className: "place" }, String(place + 1)),
    title,
    make("span", { className: "score" }, item.score.toFixed(3)),
    make("span", { className: "why" }, ...reasonsOf(item, history, largest)),
  );
  const rest = () => {
    const pinned = columns.querySelector('.item[aria-pressed="true"]');
    showEffects(pinned ? pinned.effects : null);
  };
  button.effects = item.effects;
  for (const begin of ["focus", "mouseenter"]) button.addEventListener(begin, () => showEffects(item.effects));
  for (const end of ["blur", "mouseleave"]) button.addEventListener(end, rest);
  button.addEventListener("click", () => {
    const press = button.getAttribute("aria-pressed") === "false";
    for (const other of columns.querySelectorAll(".item")) other.setAttribute("aria-pressed", "false");
    button.setAttribute("aria-pressed", String(press));
    showEffects(item.effects);
  });
  return make("li", {}, button);
}

/**
 * Show the lists.
 * @param shown {name, answer, before}: `before` the item ids of the list to compare with, or null
 */
export function showLists(shown) {
  columns.replaceChildren(
    ...shown.map(({ name, answer, before }) => {
      const flags = answer.flags.length ? `, ${answer.flags.map((flag) => flag.replaceAll("_", " ")).join(", ")}` : "";
      const largest = Math.max(1e-9, ...answer.items.flatMap(({ effects }) => effects));
      const around = { history: answer.history, largest, before };
      return make(
        "div",
        { className: "list" },
        make("h3", {}, `${name}${flags}`),
        make("ol", { "aria-label": name }, ...answer.items.map((item, place) => row(item, place, around))),
      );
    }),
  );
}

/** A sentence that says what changed. */
export function changes(items, before) {
  if (before === null) return `${items.length} recommendations`;
  const moves = items.map((item, place) => movement(item, place, before)).filter(Boolean);
  const fresh = moves.filter(({ said }) => said === "new").length;
  return moves.length ? `The list changed: ${fresh} new, ${moves.length - fresh} moved` : "The list is the same";
}
