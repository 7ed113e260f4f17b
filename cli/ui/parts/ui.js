// Keys for votes, and what is said to those who do not see it.
const keys = { a: "vote-a", b: "vote-b", "=": "vote-tie", t: "vote-tie", x: "vote-bad", s: "vote-skip" };
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.repeat) return;
  if (event.target.closest("input:not([type=radio]):not([type=checkbox]), textarea, select, [contenteditable]")) return;
  const button = document.getElementById(keys[event.key.toLowerCase()] ?? "");
  if (!button || button.disabled || button.getClientRects().length === 0) return;
  event.preventDefault();
  button.click();
});
const mend = () => document.getElementById("said")?.setAttribute("aria-live", "polite");
new MutationObserver(mend).observe(document.documentElement, { childList: true, subtree: true });
