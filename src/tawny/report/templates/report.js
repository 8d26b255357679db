// The picture and the table below it hold the same numbers: this only reads one row of the table aloud.
(() => {
  "use strict";
  const table = document.getElementById("numbers");
  const readout = document.querySelector(".readout");
  const hits = [...document.querySelectorAll(".hit")];
  if (!table || !readout || !hits.length) return;
  const heads = [...table.tHead.rows[0].cells].map((cell) => cell.textContent.trim());
  const show = (hit) => {
    for (const other of hits) other.classList.toggle("on", other.dataset.block === hit.dataset.block);
    const row = document.getElementById("block-" + hit.dataset.block);
    readout.replaceChildren(
      ...heads.map((head, index) => {
        const part = document.createElement("span");
        const value = document.createElement("b");
        value.textContent = row.cells[index].textContent.trim();
        part.append(head + " ", value);
        return part;
      })
    );
  };
  for (const svg of document.querySelectorAll("figure svg")) {
    const own = hits.filter((hit) => svg.contains(hit));
    own.forEach((hit, index) => {
      for (const event of ["pointerenter", "pointerdown", "focus"]) hit.addEventListener(event, () => show(hit));
      hit.addEventListener("keydown", (event) => {
        const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
        const next = { Home: own[0], End: own[own.length - 1] }[event.key] || (step && own[index + step]);
        if (!next) return;
        event.preventDefault();
        hit.removeAttribute("tabindex");
        next.setAttribute("tabindex", "0");
        next.focus();
      });
    });
  }
  window.addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("details")) details.open = true;
  });
})();
