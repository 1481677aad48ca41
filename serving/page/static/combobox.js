// SPDX-License-Identifier: Apache-2.0
// The combobox pattern of ARIA: a text field with a list of what was found, driven by arrows, Enter and Escape.

import { announce, make } from "./dom.js";

const PAUSE = 150;

/**
 * @param input the field
 * @param list the list of options
 * @param find (text, signal) → promise of options {label, value}
 * @param choose called with the value that was chosen
 */
export function combobox(input, list, find, choose, failed) {
  let options = [];
  let active = -1;
  let timer = 0;
  let asking = new AbortController();

  input.setAttribute("role", "combobox");
  input.setAttribute("aria-autocomplete", "list");
  input.setAttribute("aria-controls", list.id);
  list.setAttribute("role", "listbox");
  close();

  function close() {
    clearTimeout(timer);
    asking.abort();
    list.hidden = true;
    input.setAttribute("aria-expanded", "false");
    activate(-1);
  }

  function activate(place) {
    active = place;
    [...list.children].forEach((option, i) => option.setAttribute("aria-selected", String(i === place)));
    if (place < 0) input.removeAttribute("aria-activedescendant");
    else {
      input.setAttribute("aria-activedescendant", list.children[place].id);
      list.children[place].scrollIntoView({ block: "nearest" });
    }
  }

  function show(found) {
    options = found;
    list.replaceChildren(
      ...found.map((option, i) => make("li", { id: `${list.id}-${i}`, role: "option", "aria-selected": "false" }, option.label)),
    );
    list.hidden = found.length === 0;
    input.setAttribute("aria-expanded", String(found.length > 0));
    activate(-1);
    announce(found.length === 1 ? "1 found" : `${found.length} found`);
  }

  async function search() {
    asking.abort();
    const mine = (asking = new AbortController());
    try {
      const found = await find(input.value.trim(), mine.signal);
      if (!mine.signal.aborted) show(found);
    } catch (error) {
      if (error.name !== "AbortError") failed(error);
    }
  }

  function take(place) {
    const { value } = options[place];
    input.value = "";
    close();
    choose(value);
  }

  input.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(search, PAUSE);
  });
  input.addEventListener("blur", close);
  input.addEventListener("keydown", (event) => {
    const open = !list.hidden;
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      if (!open) search();
      else activate((active + (event.key === "ArrowDown" ? 1 : active < 0 ? 0 : -1) + options.length) % options.length);
    } else if (event.key === "Enter" && open) {
      event.preventDefault();
      take(Math.max(active, 0));
    } else if (event.key === "Escape") {
      if (open) close();
      else input.value = "";
    }
  });
  // A press would take the focus from the field, which closes the list before the click comes.
  list.addEventListener("mousedown", (event) => event.preventDefault());
  list.addEventListener("click", (event) => {
    const place = [...list.children].indexOf(event.target.closest("li"));
    if (place >= 0) take(place);
  });
}
