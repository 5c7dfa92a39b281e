// The labelling page as a widget of a notebook. `showTurns` is that of text.js, which stands before this in one module.

const LABELS = [["left", "Left is better", "←"], ["tie", "Equally good", "T"], ["right", "Right is better", "→"], ["skip", "Skip", "S"]];
const KEYS = { ArrowLeft: "left", 1: "left", ArrowRight: "right", 2: "right", t: "tie", 0: "tie", s: "skip" };

function made(name, className, parent, text) {
  const node = element(name, className);
  if (text) node.textContent = text;
  parent.append(node);
  return node;
}

function render({ model, el }) {
  const tab = Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
  const seen = { pair: null, since: 0, undo: "", busy: false };
  const root = made("div", "jaxrlhf-label", el);
  root.tabIndex = 0;
  root.setAttribute("role", "group");
  const title = made("h3", "", root);
  const trouble = made("p", "trouble", root);
  trouble.setAttribute("role", "alert");
  const texts = {};
  for (const [name, heading] of [["prompt", "Prompt"], ["left", "Left answer"], ["right", "Right answer"]]) {
    const sheet = made("section", name, root);
    made("h4", "", sheet, heading);
    texts[name] = made("div", "text", sheet);
  }
  const waiting = made("p", "waiting", root);
  const choices = made("div", "choices", root);
  const buttons = LABELS.map(([choice, text, key]) => {
    const button = made("button", "", choices, `${text} (${key})`);
    button.dataset.choice = choice;
    button.addEventListener("click", () => choose(choice));
    return button;
  });
  const undo = made("button", "", choices, "Undo (U)");
  undo.dataset.choice = "undo";
  undo.addEventListener("click", takeBack);
  const stands = made("p", "stands", root);
  const said = made("p", "said", root);
  said.setAttribute("role", "status");

  function ask(name, fields) {
    if (name !== "state") {
      seen.busy = true;
      enable();
    }
    model.send({ name, fields: { ...fields, tab } });
  }

  function choose(choice) {
    if (seen.busy || !seen.pair) return;
    ask("label", { lease: seen.pair.lease, choice, note: "", seconds: (performance.now() - seen.since) / 1000 });
  }

  function takeBack() {
    if (!seen.busy && seen.undo) ask("undo", { lease: seen.undo });
  }

  function enable() {
    buttons.forEach((button) => (button.disabled = seen.busy || !seen.pair));
    undo.disabled = seen.busy || !seen.undo;
  }

  function show(answer) {
    // All views of a widget hear every answer.
    if (answer.tab !== tab) return;
    const { pair, counts, board } = answer;
    seen.busy = false;
    seen.undo = answer.undo;
    trouble.textContent = answer.error ?? "";
    if (pair?.lease !== seen.pair?.lease) {
      seen.since = performance.now();
      for (const name of Object.keys(texts)) showTurns(texts[name], pair?.[name] ?? [], { asMarkdown: true });
    }
    seen.pair = pair;
    root.classList.toggle("empty", !pair);
    waiting.textContent = pair ? "" : board.ended ? "That was the last one. Thank you!" : board.doing || "No pair is waiting.";
    title.textContent = board.title;
    root.setAttribute("aria-label", board.title);
    const facts = Object.entries(board.facts).map(([name, value]) => `${name}: ${value}`);
    stands.textContent = [`${counts.given} labels given, ${counts.left} left`, ...facts].join(" · ");
    said.textContent = answer.saved ? `Saved. ${counts.left} left.` : "";
    enable();
  }

  root.addEventListener("keydown", (event) => {
    // The notebook has keys of its own, which these keep to themselves while the widget has the focus.
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || event.target.closest("textarea, input")) return;
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    const act = key === "u" ? takeBack : KEYS[key] && (() => choose(KEYS[key]));
    if (!act) return;
    event.preventDefault();
    event.stopPropagation();
    act();
  });
  model.on("msg:custom", show);
  ask("next", {});
  // Pairs may come from elsewhere, and a pair that is on the screen stays this view's.
  const timer = setInterval(() => {
    if (seen.busy) return;
    if (seen.pair) model.send({ name: "next", fields: { tab } });
    else ask("next", {});
  }, 2000);
  return () => {
    clearInterval(timer);
    model.off("msg:custom", show);
  };
}

export default { render };
