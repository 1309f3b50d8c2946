// The controls of a page: what is shown, sorted and drawn. Without this script the tables are all there.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const every = (selector, root = document) => [...root.querySelectorAll(selector)];
  const hidden = new Set();

  // ---------------------------------------------------------------- plots

  const number = (control) => (control === null || control.value === "" ? null : Number(control.value));
  const counted = (count, one) => `${count} ${one}${count === 1 ? "" : "s"}`;

  function drawFront() {
    const memory = byId("memory-axis").value, metric = byId("metric-axis").value;
    const log = document.querySelector('input[name="scale"]:checked').value === "log";
    const { zeros, missing, log: isLog } = plots.front(byId("plot-front"), data, { memory, metric, log, bars: byId("bars").value, hidden });
    const lower = data.metrics.find((one) => one.key === metric).lower;
    const notes = [`Better is to the left and ${lower ? "down" : "up"}. The step line is the front: the best that fits in so much memory; its points are larger.`];
    if (data.series.length > 1) notes.push("Hiding a method enlarges the others.");
    if (log && !isLog) notes.push("Every setting stands at 0 here, so the scale is linear.");
    if (zeros) notes.push(`${counted(zeros, "setting")} at 0 ${zeros === 1 ? "stands" : "stand"} left of the dotted line.`);
    if (missing) notes.push(`${counted(missing, "setting")} without these numbers ${missing === 1 ? "is" : "are"} not shown.`);
    byId("front-note").textContent = notes.join(" ");
    const ids = new Set(((data.fronts[memory] || {})[metric] || []).map((index) => data.groups[index].id));
    for (const row of every("#groups tbody tr")) {
      const mark = row.querySelector(".on-front");
      if (!mark) continue;
      mark.classList.toggle("yes", ids.has(row.dataset.group));
      mark.closest("td").dataset.value = ids.has(row.dataset.group) ? "0" : "1";
    }
  }

  const drawMemory = () => plots.memory(byId("plot-memory"), data, { level: number(byId("memory-level")), hidden });
  const drawCurves = () => plots.curves(byId("plot-curves"), data, { level: number(byId("curves-level")), hidden });

  function chosenMatrix() {
    const known = data.groups.filter((group) => group.matrix.length);
    const group = byId("matrix-group") ? data.groups[Number(byId("matrix-group").value)] : known[0];
    const seed = byId("matrix-seed") ? byId("matrix-seed").value : "mean";
    return { group, rows: seed === "mean" ? group.matrix : group.runs[Number(seed)].matrix };
  }

  function drawMatrix() {
    const { group, rows } = chosenMatrix();
    const below = plots.matrix(byId("plot-matrix"), rows, group.joint);
    byId("matrix-note").textContent = below ? "Above the diagonal nothing was learned yet: accuracy 0." : "";
    const table = document.createElement("table");
    table.className = "plain";
    const row = (cells, heading) => {
      const line = table.insertRow();
      cells.forEach((value, index) => {
        const cell = document.createElement(heading || index === 0 ? "th" : "td");
        if (cell.tagName === "TH") cell.scope = heading ? "col" : "row";
        cell.textContent = value;
        line.append(cell);
      });
    };
    row(["after \\ on", ...rows[0].map((_, j) => String(j + 1))], true);
    rows.forEach((values, i) => row([group.joint ? "everything" : String(i + 1), ...values.map((value) => plots.fixed(value))], false));
    byId("matrix-table").replaceChildren(table);
  }

  function fillSeeds() {
    const group = data.groups[Number(byId("matrix-group").value)];
    const option = (value, text) => {
      const found = document.createElement("option");
      found.value = value;
      found.textContent = text;
      return found;
    };
    byId("matrix-seed").replaceChildren(option("mean", "mean of the seeds"),
      ...group.runs.map((run, index) => option(String(index), run.seed === null ? `run ${index + 1}` : `seed ${run.seed}`)));
    byId("matrix-seed").disabled = group.runs.length === 0;
  }

  const drawers = [
    ["plot-front", drawFront], ["plot-memory", drawMemory], ["plot-curves", drawCurves], ["plot-matrix", drawMatrix],
    ["plot-loss", () => plots.losses(byId("plot-loss"), data.epochs)],
    ["plot-domains", () => plots.domains(byId("plot-domains"), data, hidden)],
  ].filter(([id]) => byId(id));
  // A window that is opened in the background may have no width yet; plotly cannot place its labels in that.
  let drawn = false;
  function drawAll() {
    drawn = document.documentElement.clientWidth >= 160;
    if (!drawn) return;
    drawers.forEach(([, draw]) => draw());
    document.documentElement.dataset.ready = "yes";
  }

  function on(id, draw) {
    if (byId(id)) byId(id).addEventListener("change", draw);
  }

  ["memory-axis", "metric-axis", "bars"].forEach((id) => on(id, drawFront));
  every('input[name="scale"]').forEach((input) => input.addEventListener("change", drawFront));
  on("memory-level", drawMemory);
  on("curves-level", drawCurves);
  on("matrix-group", () => { fillSeeds(); drawMatrix(); });
  on("matrix-seed", drawMatrix);

  for (const chip of every(".chip")) {
    chip.addEventListener("click", () => {
      const series = Number(chip.dataset.series);
      if (hidden.has(series)) hidden.delete(series); else hidden.add(series);
      for (const twin of every(`.chip[data-series="${series}"]`)) twin.setAttribute("aria-pressed", String(!hidden.has(series)));
      drawers.filter(([id]) => ["plot-front", "plot-memory", "plot-curves", "plot-domains"].includes(id)).forEach(([, draw]) => draw());
    });
  }

  // ---------------------------------------------------------------- tables

  function sortBy(heading) {
    const table = heading.closest("table");
    const column = heading.cellIndex;
    const current = heading.getAttribute("aria-sort");
    const numeric = heading.classList.contains("number");
    // Numbers start with the largest, names with the first.
    const up = current === "none" ? !numeric : current === "descending";
    every("thead th", table).forEach((th) => th.setAttribute("aria-sort", "none"));
    heading.setAttribute("aria-sort", up ? "ascending" : "descending");
    const rows = [...table.tBodies[0].rows].map((row, index) => ({ row, index, value: row.cells[column].dataset.value }));
    rows.sort((a, b) => {
      if (a.value === undefined || b.value === undefined) return (a.value === undefined) - (b.value === undefined) || a.index - b.index;
      const order = numeric ? Number(a.value) - Number(b.value) : a.value.localeCompare(b.value, "en", { numeric: true });
      return (up ? order : -order) || a.index - b.index;
    });
    table.tBodies[0].append(...rows.map(({ row }) => row));
  }

  every(".sortable thead th").forEach((th) => th.querySelector("button").addEventListener("click", () => sortBy(th)));
  if (byId("all-columns")) {
    byId("all-columns").addEventListener("change", (event) => byId("groups").classList.toggle("all", event.target.checked));
    byId("exact-bytes").addEventListener("change", (event) =>
      ["groups", "cells"].forEach((id) => byId(id) && byId(id).classList.toggle("exactly", event.target.checked)));
  }

  function filterPairs() {
    const metric = byId("paired-metric").value, budget = byId("paired-budget").value;
    for (const row of every("#paired tbody tr")) {
      row.hidden = (metric !== "" && row.cells[0].dataset.value !== metric) || (budget !== "" && row.cells[1].dataset.value !== budget);
    }
  }

  function filterAreas() {
    const memory = byId("areas-memory").value;
    for (const row of every("#areas tbody tr")) row.hidden = memory !== "" && row.cells[1].dataset.value !== memory;
  }

  if (byId("areas")) {
    on("areas-memory", filterAreas);
    filterAreas();
  }
  if (byId("paired")) {
    ["paired-metric", "paired-budget"].forEach((id) => on(id, filterPairs));
    filterPairs();
  }

  // ---------------------------------------------------------------- surroundings

  if (byId("matrix-group")) fillSeeds();
  drawAll();
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  window.matchMedia("(max-width: 640px)").addEventListener("change", drawAll);
  let waiting = 0;
  window.addEventListener("resize", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      if (!drawn) drawAll();
      else if (byId("plot-matrix")) drawMatrix();
    }, 150);
  });

  // On paper: light, and plots as wide as the sheet.
  function onPaper(on) {
    document.documentElement.classList.toggle("paper", on);
    plots.onPaper(on);
    drawAll();
  }
  window.addEventListener("beforeprint", () => onPaper(true));
  window.addEventListener("afterprint", () => onPaper(false));
})();
