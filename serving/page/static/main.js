// SPDX-License-Identifier: Apache-2.0
// The page: what is asked for, and what happens when it changes.

import * as api from "./api.js";
import { combobox } from "./combobox.js";
import { announce, byId, named, notice } from "./dom.js";
import { showLive, showReport, showStages } from "./figures.js";
import { refocus, showHistory } from "./history.js";
import { changes, showLists } from "./lists.js";
import { parse, summary } from "./metrics.js";
import { themes } from "./theme.js";

const LENGTH = 10;
const [SOON, LATER] = [1000, 5000];

/**
 * user: its id, or null; events: its history, oldest first; changed: whether that is another one than the server's;
 * before: the item ids of the last list of this user and version; stale: whether the lists do not follow from the rest yet;
 * loaded: the bundles; reading: the last metrics.
 */
const state = { user: null, events: [], changed: false, before: null, stale: true, loaded: [], reading: null };
const [first, second] = [byId("first"), byId("second")];
const failed = (error) => notice("error", error.message);
let asking = new AbortController();

function showEvents() {
  showHistory(state.events, (events, said, tool, place) => {
    change(events, said);
    refocus(place, tool);
  });
  const who = state.user === null ? "Nobody in particular" : `User ${state.user}`;
  const count = state.events.length === 1 ? "1 event" : `${state.events.length || "no"} events`;
  byId("history-note").textContent = `${who}: ${count}, the newest first`;
  byId("reset").hidden = !state.changed;
}

function change(events, said) {
  state.events = events;
  state.changed = true;
  announce(said);
  showEvents();
  refresh();
}

function choose(user) {
  Object.assign(state, { user, events: [], changed: false, before: null });
  refresh();
}

function add(item) {
  change([...state.events, { ...item, added: true }], `Added: ${named(item)}`);
}

/** Ask for the lists anew; what was asked before is no longer waited for. */
async function refresh() {
  asking.abort();
  const mine = (asking = new AbortController());
  state.stale = true;
  byId("columns").classList.add("busy");
  const history = state.changed ? state.events.map(({ item_id }) => item_id) : null;
  const versions = [first.value, second.value].filter(Boolean).map(Number);
  const asked = (version) => api.whatIf({ user_id: state.user, history, k: LENGTH, version }, mine.signal);
  try {
    const answers = await Promise.all((versions.length ? versions : [null]).map(asked));
    if (!mine.signal.aborted) show(answers);
  } catch (error) {
    if (error.name !== "AbortError") failed(error);
  } finally {
    if (mine === asking) byId("columns").classList.remove("busy");
  }
}

function show([main, other]) {
  notice("error", null);
  if (!state.changed) {
    state.events = main.history;
    showEvents();
  }
  const name = ({ model }) => `Version ${model.version}${model.version === state.loaded[0]?.model.version ? ", live" : ""}`;
  const ids = main.items.map(({ item_id }) => item_id);
  const shown = [{ name: name(main), answer: main, before: state.before }];
  if (other) shown.push({ name: name(other), answer: other, before: ids });
  showLists(shown);
  showStages(main.stages_ms);
  announce(changes(main.items, state.before));
  state.before = ids;
  state.stale = false;
}

/** Look for other bundles; whether there are. */
async function look() {
  const { bundles } = await api.bundles();
  const key = (loaded) => loaded.map(({ model }) => model.sha256).join();
  if (key(bundles) === key(state.loaded)) return false;
  state.loaded = bundles;
  first.replaceChildren(...bundles.map(option));
  offer();
  const { model, created } = bundles[0];
  byId("model").textContent = `${model.name}, version ${model.version}, ${model.sha256.slice(0, 12)}, made ${created.slice(0, 10)}`;
  await measured();
  return true;
}

const option = ({ model, live, canary }) => {
  const role = live ? " (live)" : canary ? " (canary)" : "";
  return new Option(`${model.version}${role}`, model.version);
};

/** Offer every other bundle to be compared with the chosen one. */
function offer() {
  const compared = second.value;
  const others = state.loaded.filter(({ model }) => String(model.version) !== first.value);
  second.replaceChildren(new Option("none", ""), ...others.map(option));
  if (others.some(({ model }) => String(model.version) === compared)) second.value = compared;
}

async function measured() {
  showReport(await api.report(first.value));
}

async function follow() {
  const why = await api.unready();
  notice("state", why);
  try {
    if (why === null && ((await look()) || state.stale)) await refresh();
    const now = { samples: parse(await api.metrics()), at: performance.now() };
    showLive(summary(now, state.reading));
    state.reading = now;
  } catch (error) {
    if (why === null) failed(error);
  }
  setTimeout(follow, why === null ? LATER : SOON);
}

const events = (count) => (count === 0 ? "new" : count === 1 ? "1 event" : `${count} events`);

combobox(
  byId("user"),
  byId("user-options"),
  async (text, signal) => (await api.findUsers(text, signal)).users.map((user) => ({ label: `${user.user_id}, ${events(user.events)}`, value: user.user_id })),
  choose,
  failed,
);
combobox(
  byId("add"),
  byId("add-options"),
  async (text, signal) => (await api.findItems(text, signal)).items.map((item) => ({ label: named(item), value: item })),
  add,
  failed,
);
first.addEventListener("change", () => {
  state.before = null;
  offer();
  measured().catch(failed);
  refresh();
});
second.addEventListener("change", refresh);
byId("reset").addEventListener("click", () => {
  choose(state.user);
  byId("add").focus();
});

themes(byId("theme"));
follow();
