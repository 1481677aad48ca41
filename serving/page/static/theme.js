// SPDX-License-Identifier: Apache-2.0
// Light, dark, or what the system says; remembered.

const NAMES = ["system", "light", "dark"];
const KEY = "recsys.theme";

function remembered() {
  try {
    return localStorage.getItem(KEY);
  } catch {
    return null;
  }
}

export function themes(button) {
  let name = NAMES.includes(remembered()) ? remembered() : "system";

  function show() {
    if (name === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = name;
    button.textContent = `Theme: ${name}`;
  }

  button.addEventListener("click", () => {
    name = NAMES[(NAMES.indexOf(name) + 1) % NAMES.length];
    try {
      localStorage.setItem(KEY, name);
    } catch {
      // A browser that keeps nothing still shows the theme.
    }
    show();
  });
  show();
}
