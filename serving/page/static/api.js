// SPDX-License-Identifier: Apache-2.0
// Asks the server.

/** A rejection, with the server's sentence. */
export class Rejected extends Error {
  constructor(reason, message) {
    super(message);
    this.reason = reason;
  }
}

async function answer(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Rejected("dependency", "The server cannot be reached.");
  }
  const body = await response.json().catch(() => ({}));
  if (!response.ok) throw new Rejected(body.error ?? "internal", body.message ?? `The server answered ${response.status}.`);
  return body;
}

const query = (values) => new URLSearchParams(Object.entries(values).filter(([, value]) => value !== null));

export const findItems = (text, signal) => answer(`/page/items?${query({ q: text })}`, { signal });
export const findUsers = (text, signal) => answer(`/page/users?${query({ q: text })}`, { signal });
export const bundles = () => answer("/page/bundles");
export const report = (version) => answer(`/page/report?${query({ version })}`);

export const whatIf = (asked, signal) =>
  answer("/page/what-if", { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(asked), signal });

/** Why the server is not ready; null where it is. */
export async function unready() {
  try {
    const response = await fetch("/readyz");
    return response.ok ? null : `The server is not ready: ${(await response.json()).message ?? "it does not say why"}`;
  } catch {
    return "The server cannot be reached.";
  }
}

export async function metrics() {
  const response = await fetch("/metrics");
  if (!response.ok) throw new Rejected("internal", `The server answered ${response.status}.`);
  return response.text();
}
