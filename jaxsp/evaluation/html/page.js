"use strict";
document.documentElement.classList.add("js");

// Tables are sorted by a button in the head of each column; equal rows keep their order.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = (row) => row.cells[column].dataset.v ?? row.cells[column].textContent.trim();
      const compare = (a, b) => {
        const [x, y] = [value(a), value(b)];
        const numbers = x !== "" && y !== "" && !isNaN(x) && !isNaN(y);
        return (numbers ? x - y : x.localeCompare(y)) * (up ? 1 : -1);
      };
      body.append(...[...body.rows].sort(compare));
    });
  });
}

// The box of a token stands beside it; the arrow keys go from token to token, each answer is one tab stop.
function place(token) {
  const tip = token.querySelector(".tip");
  if (!tip) return;
  const at = token.getBoundingClientRect();
  tip.style.setProperty("--x", "0px");
  tip.style.setProperty("--y", "0px");
  const box = tip.getBoundingClientRect();
  const x = Math.max(8, Math.min(at.left, document.documentElement.clientWidth - box.width - 8));
  const below = at.bottom + 6;
  const y = below + box.height < window.innerHeight ? below : Math.max(8, at.top - box.height - 6);
  tip.style.setProperty("--x", `${x}px`);
  tip.style.setProperty("--y", `${y}px`);
}
for (const answer of document.querySelectorAll(".tokens"))
  answer.querySelectorAll(".t").forEach((token, i) => { token.tabIndex = i ? -1 : 0; });
const tokenOf = (event) => (event.target instanceof Element ? event.target.closest(".t") : null);
for (const kind of ["mouseover", "focusin"])
  document.addEventListener(kind, (event) => {
    const token = tokenOf(event);
    if (token) place(token);
  });
document.addEventListener("keydown", (event) => {
  const token = tokenOf(event);
  if (!token) return;
  if (event.key === "Escape") token.blur();
  const tokens = [...token.closest(".tokens").querySelectorAll(".t")];
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  const next = step && tokens[tokens.indexOf(token) + step];
  if (!next) return;
  event.preventDefault();
  token.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
});
addEventListener("scroll", () => document.querySelectorAll(".t:hover, .t:focus").forEach(place), { passive: true });
