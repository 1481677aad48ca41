// SPDX-License-Identifier: Apache-2.0
// Makes elements. Text is always set as text: no string of the server is ever read as markup.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

/** An element with properties and children; strings become text. Names with a dash are attributes. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

export function makeSvg(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** A bar of a share of its track; what works against is hatched, so that colour is not all that tells. */
export function bar(share, against = false) {
  const inner = make("div", { className: against ? "bar against" : "bar" });
  inner.style.width = `${Math.min(1, Math.max(0, share)) * 100}%`;
  return make("div", { className: "track", "aria-hidden": "true" }, inner);
}

export const signed = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(2)}`;

export const named = (thing) => thing.title ?? thing.item_id;

/** Say something to a screen reader. */
export function announce(text) {
  byId("announce").textContent = text;
}

/** Show a sentence in a notice, or hide the notice where there is none. */
export function notice(id, text) {
  const element = byId(id);
  element.hidden = !text;
  if (element.textContent !== (text ?? "")) element.textContent = text ?? "";
}
