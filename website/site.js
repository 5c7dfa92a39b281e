// What scrolls sideways can be reached by keyboard: the theme makes such boxes around tables as a page is shown.
addEventListener("load", () => {
  const mark = () => document.querySelectorAll(".md-typeset__scrollwrap").forEach((box) => { box.tabIndex = 0; });
  mark();
  new MutationObserver(mark).observe(document.body, { childList: true, subtree: true });
});
