"use strict";
(function () {
  const root = document.documentElement;
  const $ = (id) => document.getElementById(id);

  // Theme: what the system says until the button was used; then that, kept where the browser lets a page keep anything.
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const button = $("theme");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const label = () => (button.textContent = isDark() ? "Light theme" : "Dark theme");
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try { localStorage.setItem("preftune-theme", root.dataset.theme); } catch (error) { /* not allowed here */ }
    label();
  });
  system.addEventListener("change", label);
  label();

  // What is wider than the screen says so: a line above it, and an edge that fades where there is more.
  for (const box of document.querySelectorAll(".scroll")) {
    const hint = document.createElement("p");
    hint.className = "more";
    hint.textContent = "more to the right →";
    hint.setAttribute("aria-hidden", "true");
    box.before(hint);
    const look = () => {
      const left = box.scrollLeft > 2, right = box.scrollWidth - box.clientWidth - box.scrollLeft > 2;
      hint.classList.toggle("on", right);
      if (left || right) box.dataset.more = left && right ? "both" : left ? "left" : "right";
      else delete box.dataset.more;
    };
    box.addEventListener("scroll", look, { passive: true });
    if ("ResizeObserver" in window) new ResizeObserver(look).observe(box);
    look();
  }

  // Where the reader is, in the contents.
  const links = new Map([...document.querySelectorAll(".contents a")].map((a) => [a.hash.slice(1), a]));
  if ("IntersectionObserver" in window) {
    const watch = new IntersectionObserver((entries) => {
      for (const entry of entries) {
        if (!entry.isIntersecting) continue;
        links.forEach((a) => a.removeAttribute("aria-current"));
        const link = links.get(entry.target.id);
        if (link) link.setAttribute("aria-current", "true");
      }
    }, { rootMargin: "-10% 0px -80% 0px" });
    links.forEach((_, id) => { const section = $(id); if (section) watch.observe(section); });
  }

  // Samples: one prompt at a time, of those that the filter lets through.
  const form = $("filter");
  if (!form) return;
  const verdicts = JSON.parse($("verdicts").textContent);
  const cards = [...document.querySelectorAll(".sample")];
  const texts = cards.map(() => null); // lower-cased on the first search
  let kept = cards.map((_, i) => i), at = 0;

  function passes(i, policy, judge, verdict, words) {
    if (policy || judge || verdict) {
      const rows = policy ? [verdicts[i][policy] || {}] : Object.values(verdicts[i]);
      const given = rows.flatMap((row) => (judge ? (judge in row ? [row[judge]] : []) : Object.values(row)));
      if (!given.some((each) => !verdict || each === verdict)) return false;
    }
    if (!words) return true;
    if (texts[i] === null) texts[i] = [...cards[i].querySelectorAll(".said p, .reply > p")].map((p) => p.textContent).join("\n").toLowerCase();
    return texts[i].includes(words);
  }
  function show() {
    cards.forEach((card) => card.classList.remove("current"));
    if (kept.length) cards[kept[at]].classList.add("current");
    const where = kept.length ? `, showing number ${at + 1}` : "";
    $("count").textContent = `${kept.length} of ${cards.length} prompts${where}`;
    $("previous").disabled = at === 0;
    $("next").disabled = at >= kept.length - 1;
  }
  function filter() {
    const [policy, judge, verdict] = ["f-policy", "f-judge", "f-verdict"].map((id) => $(id).value);
    const words = $("f-text").value.trim().toLowerCase();
    kept = cards.map((_, i) => i).filter((i) => passes(i, policy, judge, verdict, words));
    at = 0;
    show();
  }
  function move(by) {
    at = Math.min(Math.max(at + by, 0), Math.max(kept.length - 1, 0));
    show();
  }
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", filter);
  $("previous").addEventListener("click", () => move(-1));
  $("next").addEventListener("click", () => move(1));
  $("samples").addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || /^(INPUT|SELECT)$/.test(event.target.tagName)) return;
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") { event.preventDefault(); move(event.key === "ArrowLeft" ? -1 : 1); }
  });
  filter();
})();
