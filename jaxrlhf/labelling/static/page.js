import { differences, showTurns } from "./text.js";

const $ = (id) => document.getElementById(id);
const POLL = 2000; // milliseconds
const seen = { pair: null, since: 0, busy: false, ended: false, undo: "" };
const settings = { differences: false, markdown: true, keys: true };

// --- who this tab is -------------------------------------------------------------------------------------------------

// The token has become a cookie; the address is free of it, for screens that are shared and histories that are kept.
history.replaceState(null, "", "/");

const newName = () => Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
let tab = sessionStorage.getItem("tab") ?? newName();

// A duplicated tab starts with the name of the first; the one that lives already keeps it.
const tabs = new BroadcastChannel("tabs");
async function ownName() {
  await new Promise((resolve) => {
    tabs.onmessage = ({ data }) => {
      if (data.taken === tab) tab = newName();
    };
    tabs.postMessage({ wanted: tab });
    setTimeout(resolve, sessionStorage.getItem("tab") ? 120 : 0);
  });
  sessionStorage.setItem("tab", tab);
  tabs.onmessage = ({ data }) => data.wanted === tab && tabs.postMessage({ taken: tab });
}

// --- requests --------------------------------------------------------------------------------------------------------

async function ask(name, fields) {
  const response = await fetch(`/api/${name}`, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ ...fields, tab }),
    signal: AbortSignal.timeout(20000),
  });
  if (response.ok || response.status === 409) return response.json();
  if (response.status === 403) throw new Error((await response.text()).trim());
  throw new TypeError(`status ${response.status}`);
}

const sleep = (time) => new Promise((resolve) => setTimeout(resolve, time));

// Asks until there is an answer: a lost network or a restarted server only takes time.
async function insist(name, fields, lost) {
  for (let wait = 300; ; wait = Math.min(2 * wait, 5000)) {
    try {
      const answer = await ask(name, fields);
      trouble("");
      return answer;
    } catch (error) {
      if (error.constructor === Error) {
        trouble(error.message);
        wait = 5000;
      } else trouble(lost);
      await sleep(wait);
    }
  }
}

function trouble(text) {
  if ($("trouble").textContent !== text) $("trouble").textContent = text;
  $("trouble").hidden = !text;
}

function say(text) {
  $("said").textContent = text;
}

// --- what is shown ---------------------------------------------------------------------------------------------------

function showTexts() {
  const pair = seen.pair;
  if (!pair) return;
  const marks = settings.differences ? differences(pair.left, pair.right) : [null, null];
  showTurns($("prompt"), pair.prompt, { asMarkdown: settings.markdown });
  showTurns($("left"), pair.left, { asMarkdown: settings.markdown, marks: marks[0] });
  showTurns($("right"), pair.right, { asMarkdown: settings.markdown, marks: marks[1] });
}

function showPair(pair) {
  const fresh = pair?.lease !== seen.pair?.lease;
  seen.pair = pair;
  $("pair").hidden = !pair;
  $("waiting").hidden = Boolean(pair);
  if (pair && fresh) {
    seen.since = performance.now();
    $("note").value = "";
    showTexts();
    $("pair").classList.remove("fresh");
    requestAnimationFrame(() => $("pair").classList.add("fresh"));
  }
  if (fresh || !pair) document.body.dataset.lease = pair?.lease ?? "";
  enable();
}

function enable() {
  const ready = Boolean(seen.pair) && !seen.busy;
  document.querySelectorAll("[data-choice]").forEach((button) => button.setAttribute("aria-disabled", String(!ready)));
  $("undo").setAttribute("aria-disabled", String(!seen.undo || seen.busy));
}

function fact(name, value) {
  const [term, told] = [document.createElement("dt"), document.createElement("dd")];
  term.textContent = name;
  told.textContent = value;
  $("facts").append(term, told);
}

function showState({ counts, board, undo }) {
  seen.undo = undo;
  seen.ended = board.ended;
  document.title = board.title;
  $("title").textContent = board.title;
  const wanted = counts.given + counts.left;
  $("bar").max = Math.max(wanted, 1);
  $("bar").value = counts.given;
  $("given").textContent = `${counts.given} of ${wanted} labels given`;
  $("doing").textContent = board.doing;
  $("waiting").textContent = board.ended
    ? "That was the last one. Thank you! You can close this page."
    : counts.left ? "The pairs that are left are with other people." : board.doing || "No pair is waiting.";
  $("facts").replaceChildren();
  fact("Left", String(counts.left));
  fact("Yours", String(counts.own));
  fact("Labels a minute", counts.per_minute.toFixed(1));
  if (counts.repeated) fact("Same label when asked again", `${counts.same} of ${counts.repeated}`);
  if (counts.forecast) fact("As the reward model expected", `${counts.agreed} of ${counts.forecast}`);
  if (board.curve.length) fact("Step", String(board.curve.at(-1).step));
  const latest = (name) => board.curve.findLast((row) => Number.isFinite(row[name]))?.[name];
  const [byLabels, byReward] = [latest("win_rate"), latest("reward_win_rate")];
  if (byLabels !== undefined) fact("Win rate by labels", byLabels.toFixed(2));
  if (byReward !== undefined) fact("Win rate by the reward model", byReward.toFixed(2));
  if (latest("kl") !== undefined) fact("KL to the reference (nats)", latest("kl").toFixed(3));
  for (const [name, value] of Object.entries(board.facts)) fact(name, value);
  if (byLabels !== undefined) drawCurve(board.curve, "win_rate", "by your labels");
  else drawCurve(board.curve, "reward_win_rate", "as the reward model sees it");
  enable();
}

function shape(name, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, String(value));
  return made;
}

function drawCurve(curve, name, source) {
  const rows = curve.filter((row) => Number.isFinite(row[name]));
  $("figure").hidden = rows.length < 2;
  if (rows.length < 2) return;
  const [first, last] = [rows[0].step, rows.at(-1).step];
  const points = rows.map((row) => `${5 + (230 * (row.step - first)) / (last - first)},${85 - 80 * row[name]}`);
  const half = { x1: 5, x2: 235, y1: 45, y2: 45 };
  $("curve").replaceChildren(shape("line", half), shape("polyline", { points: points.join(" ") }));
  $("curve-text").textContent =
    `Win rate against the reference ${source}, steps ${first} to ${last}; the dashed line is one half.`;
}

// --- labels ----------------------------------------------------------------------------------------------------------

// What is not yet saved survives a reload and a closed tab. Sent twice, it is saved once.
const UNSENT = "unsent-";

function leftUnsent() {
  const found = [];
  for (const name of Object.keys(localStorage).filter((each) => each.startsWith(UNSENT)))
    try {
      found.push(JSON.parse(localStorage.getItem(name)));
    } catch {
      localStorage.removeItem(name);
    }
  return found;
}

async function send(unsent) {
  seen.busy = true;
  enable();
  localStorage.setItem(UNSENT + unsent.lease, JSON.stringify(unsent));
  const answer = await insist("label", unsent, "Your label is not saved yet: the server does not answer. Trying again …");
  localStorage.removeItem(UNSENT + unsent.lease);
  await settle(answer, answer.error ?? told(answer));
}

function told({ agreed, counts }) {
  const opinion = agreed === true ? " The reward model agreed." : agreed === false ? " The reward model disagreed." : "";
  return `Saved.${opinion} ${counts.left} left.`;
}

async function settle(answer, words) {
  const whole = answer.error ? await insist("next", {}, "The server does not answer. Trying again …") : answer;
  seen.busy = false;
  showState(whole);
  showPair(whole.pair);
  if (answer.error) trouble(answer.error);
  say(words);
}

function choose(choice) {
  if (seen.busy || !seen.pair) return;
  const seconds = (performance.now() - seen.since) / 1000;
  send({ lease: seen.pair.lease, choice, note: $("note").value, seconds });
}

async function undo() {
  if (seen.busy || !seen.undo) return;
  seen.busy = true;
  enable();
  await settle(await insist("undo", { lease: seen.undo }, "The server does not answer. Trying again …"), "Undone. Label this pair again.");
}

// --- keys, clicks, settings ------------------------------------------------------------------------------------------

const KEYS = {
  ArrowLeft: () => choose("left"), 1: () => choose("left"), ArrowRight: () => choose("right"), 2: () => choose("right"),
  t: () => choose("tie"), 0: () => choose("tie"), s: () => choose("skip"), u: undo,
  n: () => $("note").focus(), d: () => toggle("differences"), m: () => toggle("markdown"),
};

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && document.activeElement === $("note")) $("note").blur();
  if (!settings.keys || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if (event.target.closest?.("textarea, input:not([type=checkbox])")) return;
  const act = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!act) return;
  event.preventDefault();
  act();
});

function toggle(name) {
  settings[name] = !settings[name];
  $(name).checked = settings[name];
  localStorage.setItem(name, JSON.stringify(settings[name]));
  if (name !== "keys") showTexts();
}

for (const name of Object.keys(settings)) {
  try {
    settings[name] = JSON.parse(localStorage.getItem(name)) ?? settings[name];
  } catch {
    localStorage.removeItem(name);
  }
  $(name).checked = settings[name];
  $(name).addEventListener("change", () => toggle(name));
}
document.querySelectorAll("[data-choice]").forEach((button) => button.addEventListener("click", () => choose(button.dataset.choice)));
$("undo").addEventListener("click", undo);

// --- the whole -------------------------------------------------------------------------------------------------------

async function poll() {
  for (;;) {
    await sleep(document.hidden ? 5 * POLL : POLL);
    if (seen.busy) continue;
    try {
      const waiting = !seen.pair;
      const answer = await ask(waiting ? "next" : "state", { lease: seen.pair?.lease ?? "" });
      if (seen.busy) continue;
      trouble("");
      showState(answer);
      if (waiting) showPair(answer.pair);
    } catch (error) {
      if (!seen.ended) trouble(error.constructor === Error ? error.message : "The server does not answer. Trying again …");
    }
  }
}

async function begin() {
  await ownName();
  await settle(await insist("next", {}, "The server does not answer. Trying again …"), "");
  for (const unsent of leftUnsent()) await send(unsent);
  poll();
}

begin();
