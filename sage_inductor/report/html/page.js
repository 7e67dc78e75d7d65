"use strict";
// Hides the sites that the filters leave out, and the modules that are left without any.
(() => {
  const { sites } = JSON.parse(document.getElementById("report").textContent);
  const rows = [...document.querySelectorAll("[data-site]")];
  const groups = [...document.querySelectorAll(".group")].reverse(); // the innermost first
  const form = document.querySelector("form");
  const search = form.elements.namedItem("search");
  const count = document.querySelector(".count");
  const texts = sites.map((site) => JSON.stringify(Object.values(site)).toLowerCase());
  const checked = (name) => new Set([...form.querySelectorAll(`[name=${name}]:checked`)].map((box) => box.value));

  const apply = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const decisions = checked("decision");
    const reasons = checked("reason");
    let shown = 0;
    for (const row of rows) {
      const text = texts[Number(row.dataset.site)];
      const kinds = JSON.parse(row.dataset.reasons);
      const fits =
        words.every((word) => text.includes(word)) &&
        (decisions.size === 0 || decisions.has(row.dataset.decision)) &&
        (reasons.size === 0 || kinds.some((kind) => reasons.has(kind)));
      row.hidden = !fits;
      shown += fits;
    }
    for (const group of groups) group.hidden = group.querySelector("[data-site]:not([hidden])") === null;
    count.textContent = `${shown} of ${rows.length} shown`;
  };

  document.documentElement.classList.add("scripted");
  form.addEventListener("input", apply);
  form.querySelector("[data-clear]").addEventListener("click", () => {
    form.reset();
    apply();
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  for (const button of form.querySelectorAll("[data-open]"))
    button.addEventListener("click", () => {
      for (const group of groups) group.open = button.dataset.open === "true";
    });
  apply(); // a reloaded page keeps what was typed
})();
