// The plots of a page, drawn by plotly from the page's data. Texts reach plotly through plain(): it reads some HTML.
"use strict";
const plots = (() => {
  const SYMBOLS = ["circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x", "star"]; // as in _tables.py
  const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
  const PATTERNS = ["", "/", ".", "\\", "x", "-"]; // of components, as in _tables.py
  const COMPONENT_COLOURS = [0, 6, 2, 5, 1, 3];
  const FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif';

  // ---------------------------------------------------------------- words

  const plain = (text) =>
    String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;").replace(/\s+/g, " ");

  // The middle goes where a text is too long: labels of a sweep differ at their ends.
  const short = (text, length) =>
    text.length <= length ? text : text.slice(0, Math.ceil(length * 0.4)) + "…" + text.slice(text.length - Math.floor(length * 0.6) + 1);

  // As contlearn.memory.units.in_words.
  function inWords(bytes) {
    for (const [unit, factor] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) {
      if (Math.abs(bytes) < factor) continue;
      return `${Math.abs(bytes) < 999.5 * factor ? Number((bytes / factor).toPrecision(3)) : (bytes / factor).toFixed(0)} ${unit}`;
    }
    return `${Math.round(bytes)} B`;
  }

  const fixed = (value, digits = 3) => (value === null || value === undefined ? "–" : value.toFixed(digits).replace("-", "−"));
  const exact = (bytes) => `${inWords(bytes)} (${Math.round(bytes).toLocaleString("en-US")} B)`;
  const count = (number) => Number(number.toPrecision(6)).toLocaleString("en-US");
  const withSpread = ([mean, sd], show) => show(mean) + (sd === null ? "" : ` ± ${show(sd)}`);

  // ---------------------------------------------------------------- theme

  function theme() {
    const style = getComputedStyle(document.documentElement);
    const read = (name) => style.getPropertyValue(`--${name}`).trim();
    const colours = [0, 1, 2, 3, 4, 5, 6].map((index) => read(`series-${index}`));
    return {
      ink: read("ink"), muted: read("muted"), line: read("line"), grid: read("grid"), surface: read("surface"),
      edge: read("edge"), colours, component: (index) => colours[COMPONENT_COLOURS[index % COMPONENT_COLOURS.length]], series: (index) => colours[index % colours.length],
    };
  }

  function template(t) {
    const axis = {
      gridcolor: t.grid, linecolor: t.line, zerolinecolor: t.line, tickcolor: t.line, zeroline: false, showline: true,
      ticks: "outside", ticklen: 5, automargin: true, title: { standoff: 10 },
    };
    return {
      layout: {
        font: { family: FONT, size: 13, color: t.ink }, colorway: t.colours, paper_bgcolor: "rgba(0,0,0,0)",
        plot_bgcolor: "rgba(0,0,0,0)", xaxis: axis, yaxis: axis, hovermode: "closest",
        hoverlabel: { bgcolor: t.surface, bordercolor: t.muted, align: "left", font: { family: FONT, size: 13, color: t.ink } },
        modebar: { bgcolor: "rgba(0,0,0,0)", color: t.muted, activecolor: t.ink },
      },
    };
  }

  // On the page the keys are HTML, which a saved picture needs inside.
  const SAVE = {
    name: "save", title: "Save as SVG", icon: Plotly.Icons.camera,
    click: (element) => {
      const t = theme();
      const named = element.data.filter((trace) => trace.showlegend !== false && trace.name).length > 1;
      const width = element.clientWidth, height = element.clientHeight + (named ? 60 : 0);
      const layout = {
        ...element.layout, showlegend: named, legend: { orientation: "h", y: -0.16, yanchor: "top", font: { size: 13 } },
        paper_bgcolor: t.surface, autosize: false, width, height,
      };
      return Plotly.downloadImage({ data: element.data, layout }, { format: "svg", width, height, filename: element.id.replace("plot-", "contlearn-") });
    },
  };

  const SHEET = 660; // pixels of a plot on paper
  let paper = false;
  const isNarrow = () => !paper && window.innerWidth <= 640;
  const widthOf = (element) => (paper ? SHEET : element.clientWidth);

  function draw(element, traces, layout, t) {
    const narrow = isNarrow();
    const base = {
      template: template(t), showlegend: false, ...(paper ? { autosize: false, width: SHEET } : { autosize: true }),
      // A finger on a plot scrolls the page; a mouse may zoom into it.
      dragmode: narrow || window.matchMedia("(pointer: coarse)").matches ? false : "zoom",
      margin: narrow ? { l: 8, r: 12, t: 12, b: 8 } : { l: 8, r: 16, t: 22, b: 8 },
    };
    return Plotly.react(element, traces, { ...base, ...layout }, {
      responsive: true, displaylogo: false, displayModeBar: narrow ? false : "hover", doubleClick: "reset",
      // No button, and no address, that would send a chart to anybody's server (plotly has both by default).
      modeBarButtons: [base.dragmode && layout.dragmode !== false ? [SAVE, "resetScale2d"] : [SAVE]],
      showSendToCloud: false, plotlyServerURL: "", topojsonURL: "about:blank",
    });
  }

  // ---------------------------------------------------------------- axes of bytes

  function niceStep(width) {
    const power = 10 ** Math.floor(Math.log10(width));
    return power * [1, 2, 5, 10].find((factor) => factor * power >= width * 0.999);
  }

  function linearTicks(low, high, count) {
    const step = niceStep((high - low) / count);
    const ticks = [];
    for (let value = Math.ceil(low / step - 1e-9) * step; value <= high * (1 + 1e-9); value += step) ticks.push(value);
    return ticks;
  }

  function logTicks(low, high, count) {
    const inside = (factors, every) => {
      const found = [];
      for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) {
        if (power % every) continue;
        for (const factor of factors) if (factor * 10 ** power >= low && factor * 10 ** power <= high) found.push(factor * 10 ** power);
      }
      return found;
    };
    const sets = [[[1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9], 1], [[1, 2, 3, 5, 7], 1], [[1, 2, 5], 1], [[1, 3], 1], [[1], 1], [[1], 2], [[1], 3]];
    const least = Math.log10(high / low) / (count + 3); // labels any closer would run into each other
    const apart = (ticks) => ticks.every((value, index) => index === 0 || Math.log10(value / ticks[index - 1]) >= least);
    const found = sets.map(([factors, every]) => inside(factors, every)).find((ticks) => ticks.length <= count && apart(ticks)) || [];
    return found.length >= 3 ? found : linearTicks(low, high, Math.max(2, count - 1)).filter((value) => value > 0);
  }

  // Tick positions and texts in whole units between two amounts of bytes; `zeroAt` is where a log axis shows nothing.
  function byteTicks(low, high, log, count, zeroAt, words = inWords) {
    const from = zeroAt === null ? low : Math.max(low, zeroAt * 1.5);
    const tickvals = log ? logTicks(from, high, count) : linearTicks(low, high, count);
    const ticktext = tickvals.map(words);
    if (zeroAt !== null && low <= zeroAt) { tickvals.unshift(zeroAt); ticktext.unshift("0"); }
    return { tickmode: "array", tickvals, ticktext, tickangle: 0 };
  }

  // ---------------------------------------------------------------- accuracy over memory

  function describe(data, group, memory, metric, onFront) {
    const names = Object.fromEntries(data.memory.map((one) => [one.key, one.label]));
    const amounts = (key) => (key === "memory_size" ? count : exact);
    const measure = data.metrics.find((one) => one.key === metric);
    const [, , low, high, n] = group.metrics[metric];
    const lines = [`<b>${plain(short(group.label, 44))}</b>`];
    if (group.strategy !== group.label) lines.push(`strategy ${plain(short(group.strategy, 40))}`);
    if (group.level !== null) lines.push(`budget ${group.budget}`);
    if (group.options) lines.push(plain(short(group.options, 52)));
    lines.push(`${plain(measure.label)} <b>${withSpread(group.metrics[metric], fixed)}</b>`);
    if (low !== null && high !== null) lines.push(`interval ${fixed(low)} to ${fixed(high)}`);
    const seeds = group.seeds.length && group.seeds.length <= 10 ? ` (${group.seeds.join(", ")})` : "";
    lines.push(`${n || group.seeds.length} ${(n || group.seeds.length) === 1 ? "seed" : "seeds"}${seeds}`);
    const shown = [memory, ...["persistent", "peak_static", "peak_measured", "activations", "replay"].filter((key) => key !== memory)];
    for (const key of shown) {
      const amount = group.memory[key];
      if (!amount || amount[0] === null) continue;
      const spread = amount[1] ? ` ± ${inWords(amount[1])}` : "";
      const words = `${plain(names[key])} ${amounts(key)(amount[0])}`;
      lines.push((key === memory ? `<b>${words}</b>` : words) + spread);
    }
    if (onFront) lines.push("on the front");
    return lines.join("<br>");
  }

  function errors(stats, kind, floor) {
    const up = [], down = [];
    for (const [mean, sd, low, high] of stats) {
      const plus = kind === "sd" ? sd : high === null ? null : high - mean;
      const minus = kind === "sd" ? sd : low === null ? null : mean - low;
      up.push(Math.max(0, plus || 0));
      down.push(Math.max(0, Math.min(minus || 0, floor === null ? Infinity : mean - floor)));
    }
    return { type: "data", symmetric: false, array: up, arrayminus: down };
  }

  // Returns how many groups were drawn, and how many of them stand at zero bytes on a log axis.
  function front(element, data, { memory, metric, log: wantsLog, bars, hidden }) {
    const t = theme();
    const narrow = isNarrow();
    const has = (group) => (group.memory[memory] || [null])[0] !== null && (group.metrics[metric] || [null])[0] !== null;
    const all = data.groups.map((group, index) => ({ group, index })).filter(({ group }) => has(group));
    // Hiding a method makes room for the others.
    const shown = all.some(({ group }) => !hidden.has(group.series)) ? all.filter(({ group }) => !hidden.has(group.series)) : all;
    const amounts = shown.map(({ group }) => group.memory[memory][0]);
    const positive = amounts.filter((value) => value > 0);
    const log = wantsLog && positive.length > 0;
    const zeros = log ? amounts.length - positive.length : 0;
    const least = Math.min(...positive), most = Math.max(...amounts, 0);
    const zeroAt = zeros ? least / 10 ** Math.max(0.2, 0.14 * Math.log10(most / least)) : null;
    const at = (value) => (log && value <= 0 ? zeroAt ?? least / 1e6 : value);
    let range;
    if (log) {
      const low = Math.log10(zeroAt === null ? least : zeroAt), high = Math.log10(most);
      const pad = Math.max(0.04, (high - low) * 0.06);
      range = [low - pad, high + pad];
    } else {
      range = [Math.min(0, ...amounts), (most || 1) * 1.05];
      if (positive.length && Math.min(...amounts) > 0.6 * most) {
        const pad = Math.max((most - Math.min(...amounts)) * 0.12, most * 0.02);
        range = [Math.min(...amounts) - pad, most + pad];
      }
    }
    const bytes = (value) => (log ? 10 ** value : value);
    const heights = shown.flatMap(({ group }) => {
      const [mean, sd, low, high] = group.metrics[metric];
      return [mean - (sd || 0), mean + (sd || 0), low ?? mean, high ?? mean];
    });
    const top = Math.max(...heights), bottom = Math.min(...heights), room = Math.max(0.06 * (top - bottom), 0.02);
    const ids = ((data.fronts[memory] || {})[metric] || []).filter((index) => has(data.groups[index]));
    const traces = [];
    if (ids.length && all.length > 1) {
      const x = ids.map((index) => at(data.groups[index].memory[memory][0]));
      const y = ids.map((index) => data.groups[index].metrics[metric][0]);
      traces.push({
        type: "scatter", mode: "lines", name: "front", x: [...x, bytes(range[1])], y: [...y, y[y.length - 1]],
        line: { shape: "hv", color: t.ink, width: 2 }, opacity: 0.55, hoverinfo: "skip", cliponaxis: true,
      });
    }
    data.series.forEach((name, series) => {
      const members = all.filter(({ group }) => group.series === series);
      members.sort((a, b) => a.group.memory[memory][0] - b.group.memory[memory][0]);
      const colour = t.series(series);
      const bar = { color: colour, thickness: 1.3, width: 4, visible: bars !== "none" };
      traces.push({
        type: "scatter", mode: "lines+markers", name: plain(name), visible: !hidden.has(series),
        x: members.map(({ group }) => at(group.memory[memory][0])), y: members.map(({ group }) => group.metrics[metric][0]),
        error_x: { ...bar, ...errors(members.map(({ group }) => group.memory[memory]), bars, log ? bytes(range[0]) : null) },
        error_y: { ...bar, ...errors(members.map(({ group }) => group.metrics[metric]), bars, null) },
        line: { color: colour, width: 1, dash: "dot" },
        marker: {
          symbol: SYMBOLS[series % SYMBOLS.length], color: colour, opacity: 1,
          size: members.map(({ index }) => (ids.includes(index) ? 13 : 10) - (narrow ? 1 : 0)),
          line: { color: t.edge, width: members.map(({ index }) => (ids.includes(index) ? 1.6 : 0.6)) },
        },
        hoverinfo: "text",
        hovertext: members.map(({ group, index }) => describe(data, group, memory, metric, ids.includes(index))),
        hoverlabel: { bordercolor: colour },
      });
    });
    const ticks = Math.max(3, Math.min(9, Math.floor(widthOf(element) / 90)));
    const axis = data.memory.find((one) => one.key === memory), measure = data.metrics.find((one) => one.key === metric);
    const shapes = zeroAt === null ? [] : [{
      type: "line", xref: "x", yref: "paper", x0: Math.sqrt(zeroAt * least), x1: Math.sqrt(zeroAt * least), y0: 0, y1: 1,
      line: { color: t.line, width: 1, dash: "dot" }, layer: "below",
    }];
    const words = axis.unit === "bytes" ? inWords : count;
    element.byteAxis = { log, ticks, zeroAt, words };
    draw(element, traces, {
      height: narrow ? 400 : 520, shapes,
      xaxis: {
        type: log ? "log" : "linear", range, title: { text: `${plain(axis.label)}${axis.unit === "bytes" ? ", bytes" : ""}${log ? ", log scale" : ""}` },
        ...byteTicks(bytes(range[0]), bytes(range[1]), log, ticks, zeroAt, words),
      },
      yaxis: { title: { text: plain(measure.label) + (measure.lower ? " (lower is better)" : "") }, range: [bottom - room, top + room] },
    }, t);
    if (!element.retickled) {
      element.retickled = true;
      element.on("plotly_relayout", () => retick(element));
    }
    return { drawn: all.length, zeros, missing: data.groups.length - all.length, log };
  }

  // After a zoom the ticks follow the new range.
  function retick(element) {
    const { log, ticks, zeroAt, words } = element.byteAxis;
    const key = element.layout.xaxis.range.join();
    if (element.tickedFor === key) return;
    element.tickedFor = key;
    const [low, high] = element.layout.xaxis.range.map((value) => (log ? 10 ** value : value));
    const { tickvals, ticktext } = byteTicks(low, high, log, ticks, zeroAt, words);
    Plotly.relayout(element, { "xaxis.tickvals": tickvals, "xaxis.ticktext": ticktext });
  }

  // ---------------------------------------------------------------- bytes by component

  function memory(element, data, { level, hidden }) {
    const t = theme();
    const narrow = isNarrow();
    const run = data.kind === "run";
    let rows = data.groups
      .filter((group) => !hidden.has(group.series) && (level === null || group.level === level || group.level === null))
      .map((group) => ({
        label: run ? "whole run" : group.label + (group.level === null ? "" : ` · ${group.budget}`) + (group.options && !group.label.includes("=") ? ` · ${group.options}` : ""),
        bytes: Object.fromEntries(Object.entries(group.memory).map(([key, stats]) => [key, stats[0]])), series: group.series, level: group.level,
      }));
    if (run && data.steps.length > 1) rows = data.steps.map((step) => ({ label: step.label, bytes: step.memory }));
    else rows.sort((a, b) => a.series - b.series || (a.level ?? -1) - (b.level ?? -1));
    const length = narrow ? 22 : 44;
    const total = (row) => data.components.reduce((sum, { key }) => sum + (row.bytes[key] || 0), 0);
    const most = Math.max(1, ...rows.map(total));
    const hover = (row) => {
      const lines = [`<b>${plain(short(row.label, 48))}</b>`];
      for (const one of data.memory.filter(({ key }) => !["budget", "memory_size"].includes(key))) {
        if (row.bytes[one.key] !== null && row.bytes[one.key] !== undefined) lines.push(`${plain(one.label)} ${exact(row.bytes[one.key])}`);
      }
      return lines.join("<br>");
    };
    const y = rows.map((_, index) => index);
    const hovertext = rows.map(hover);
    const colour = (index) => t.component(index);
    const traces = data.components.map(({ key, label }, index) => ({
      type: "bar", orientation: "h", name: plain(label), y, x: rows.map((row) => row.bytes[key] || 0), hoverinfo: "text", hovertext,
      marker: {
        color: colour(index), line: { color: t.surface, width: 0.5 },
        pattern: { shape: PATTERNS[index % PATTERNS.length], bgcolor: colour(index), fgcolor: t.surface, size: 7, solidity: 0.2 },
      },
    }));
    const side = run ? 26 : narrow ? 22 : 24;
    draw(element, traces, {
      barmode: "stack", bargap: 0.28, height: rows.length * side + 76, dragmode: false, margin: { l: 8, r: 16, t: 14, b: 8 },
      xaxis: { range: [0, most * 1.02], ...byteTicks(0, most * 1.02, false, narrow ? 3 : 7, null), title: { text: "bytes" } },
      yaxis: {
        range: [rows.length - 0.5, -0.5], tickmode: "array", tickvals: y, ticktext: rows.map((row) => plain(short(row.label, length))),
        ticks: "", showgrid: false, tickfont: { size: narrow ? 11 : 13 },
      },
    }, t);
    return rows.length;
  }

  // ---------------------------------------------------------------- accuracy after each experience

  const faint = (colour) => {
    const [red, green, blue] = [1, 3, 5].map((start) => parseInt(colour.slice(start, start + 2), 16));
    return `rgba(${red},${green},${blue},0.14)`;
  };

  function wholeTicks(count, narrow) {
    const step = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10000].find((one) => count / one <= (narrow ? 8 : 20)) || count;
    return { tickmode: "linear", tick0: step === 1 ? 1 : 0, dtick: step };
  }

  function curves(element, data, { level, hidden }) {
    const t = theme();
    const shown = data.groups.filter((group) => group.curve.some(([mean]) => mean !== null) && (level === null || group.level === level || group.level === null));
    const longest = Math.max(1, ...shown.map((group) => Math.max(group.curve.length, group.joint && group.matrix.length ? group.matrix[0].length : 0)));
    const bands = [], lines = [];
    for (const group of shown) {
      if (hidden.has(group.series)) continue;
      const colour = t.series(group.series);
      let points = group.curve.map(([mean, sd], index) => ({ x: index + 1, mean, sd })).filter(({ mean }) => mean !== null);
      if (group.joint && points.length) points = [{ ...points[0], x: 1 }, { ...points[0], x: longest }];
      if (points.length > 1 && points.some(({ sd }) => sd)) {
        const low = points.map(({ mean, sd }) => mean - (sd || 0)), high = points.map(({ mean, sd }) => mean + (sd || 0));
        bands.push({
          type: "scatter", mode: "lines", showlegend: false, fill: "toself", fillcolor: faint(colour), line: { width: 0, color: colour }, hoverinfo: "skip",
          x: [...points.map(({ x }) => x), ...points.map(({ x }) => x).reverse()], y: [...high, ...low.reverse()],
        });
      }
      const name = group.label + (group.level === null ? "" : ` · ${group.budget}`);
      lines.push({
        type: "scatter", mode: "lines+markers", name: plain(name), x: points.map(({ x }) => x), y: points.map(({ mean }) => mean),
        line: { color: colour, width: 2, dash: group.joint ? "dash" : DASHES[Math.floor(group.series / 8) % DASHES.length] },
        marker: { symbol: SYMBOLS[group.series % SYMBOLS.length], color: colour, size: 9, line: { color: t.edge, width: 0.6 } },
        hoverinfo: "text", hoverlabel: { bordercolor: colour }, cliponaxis: false,
        hovertext: points.map(({ x, mean, sd }) =>
          `<b>${plain(short(name, 44))}</b><br>${group.joint ? "trained on everything at once" : `after experience ${x}`}<br>accuracy ${withSpread([mean, sd || null], fixed)}`),
      });
    }
    const narrow = isNarrow();
    const least = Math.min(1, ...lines.flatMap((line) => line.y));
    draw(element, [...bands, ...lines], {
      height: narrow ? 340 : 430,
      xaxis: { range: [1 - 0.03 * Math.max(longest - 1, 1), longest + 0.03 * Math.max(longest - 1, 1)], title: { text: "experiences learned" }, ...wholeTicks(longest, narrow) },
      yaxis: { range: [least > 0.6 ? Math.max(0, Math.floor(least * 10 - 0.5) / 10) : 0, 1.02], title: { text: "accuracy on everything seen" } },
    }, t);
    return lines.length;
  }

  // ---------------------------------------------------------------- accuracy matrix

  // Whether everything above the diagonal is zero: experiences whose classes were not learned yet.
  const onlyLearned = (rows) =>
    rows.length > 1 && rows.length === rows[0].length && rows.every((row, i) => row.every((value, j) => j <= i || !value));

  // Returns whether the cells above the diagonal were left empty.
  function matrix(element, rows, joint) {
    const t = theme();
    const narrow = isNarrow();
    const columns = rows[0].length;
    const left = joint ? 16 : 52, right = 12, top = 12, bottom = 50;
    const room = (paper ? SHEET : element.closest("section").clientWidth) - left - right - 26;
    const cell = Math.max(4, Math.min(76, room / columns));
    const numbers = cell >= 24;
    const below = onlyLearned(rows);
    const blank = (i, j) => rows[i][j] === null || (below && j > i);
    const ticks = (count) => {
      const every = [1, 2, 5, 10, 20, 50, 100].find((step) => step * cell >= 20) || 200;
      const at = [...Array(count).keys()].filter((index) => every === 1 || (index + 1) % every === 0);
      return { tickmode: "array", tickvals: at, ticktext: at.map((index) => String(index + 1)), ticks: "", showgrid: false, showline: false, automargin: false };
    };
    const where = (i) => (joint ? "after everything" : `after experience ${i + 1}`);
    const pairs = rows.flatMap((row, i) => row.map((value, j) => ({ i, j, value }))).filter(({ i, j }) => !blank(i, j));
    draw(element, [{
      type: "heatmap", z: rows.map((row, i) => row.map((value, j) => (blank(i, j) ? null : value))), zmin: 0, zmax: 1, colorscale: "Cividis",
      xgap: 1, ygap: 1, hoverongaps: false, hoverinfo: "text", showscale: !numbers,
      hovertext: rows.map((row, i) => row.map((value, j) => `${where(i)}<br>on test experience ${j + 1}<br>accuracy <b>${fixed(value)}</b>`)),
      colorbar: { thickness: 10, outlinewidth: 0, tickvals: [0, 0.5, 1], ticks: "" },
    }, {
      type: "scatter", mode: "text", hoverinfo: "skip", visible: numbers, x: pairs.map(({ j }) => j), y: pairs.map(({ i }) => i),
      text: pairs.map(({ value }) => (cell >= 34 ? value.toFixed(2) : value.toFixed(2).replace(/^0/, ""))),
      textfont: { size: cell >= 52 ? 14 : cell >= 34 ? 12 : 10, color: pairs.map(({ value }) => (value > 0.5 ? "#000000" : "#ffffff")) },
    }], {
      autosize: false, width: cell * columns + left + right + (numbers ? 0 : 60), height: Math.max(cell * rows.length, 30) + top + bottom,
      dragmode: false, margin: { l: left, r: right + (numbers ? 0 : 60), t: top, b: bottom },
      xaxis: { title: { text: "on test experience" }, range: [-0.5, columns - 0.5], ...ticks(columns) },
      yaxis: { title: { text: joint ? "" : "after experience" }, range: [rows.length - 0.5, -0.5], ...ticks(rows.length), showticklabels: !joint },
    }, t);
    return below;
  }

  // ---------------------------------------------------------------- a run

  function losses(element, epochs) {
    const t = theme();
    const narrow = isNarrow();
    const starts = epochs.map(([experience], index) => (index === 0 || epochs[index - 1][0] !== experience ? index : -1)).filter((index) => index >= 0);
    const x = [], y = [], hovertext = [];
    epochs.forEach(([experience, epoch, loss, rate], index) => {
      if (index && starts.includes(index)) { x.push(index + 0.5); y.push(null); hovertext.push(""); }
      x.push(index + 1);
      y.push(loss);
      hovertext.push(`experience ${experience + 1}, epoch ${epoch + 1}<br>loss <b>${loss === null ? "not finite" : Number(loss.toPrecision(4))}</b>${rate === null ? "" : `<br>learning rate ${rate}`}`);
    });
    const several = starts.length > 1 && starts.length <= 40;
    const ends = starts.map((start, index) => [start + 0.5, (starts[index + 1] ?? epochs.length) + 0.5]);
    const shapes = several ? ends.filter((_, index) => index % 2).map(([x0, x1]) => ({
      type: "rect", xref: "x", yref: "paper", x0, x1, y0: 0, y1: 1, fillcolor: t.grid, opacity: 0.55, line: { width: 0 }, layer: "below",
    })) : [];
    const annotations = several ? ends.map(([x0, x1], index) => ({
      x: (x0 + x1) / 2, y: 1, yref: "paper", yanchor: "bottom", showarrow: false, text: narrow || starts.length > 12 ? `${epochs[starts[index]][0] + 1}` : `experience ${epochs[starts[index]][0] + 1}`,
      font: { size: 12, color: t.muted },
    })) : [];
    draw(element, [{
      type: "scatter", mode: epochs.length > 300 ? "lines" : "lines+markers", x, y, hoverinfo: "text", hovertext, connectgaps: false,
      line: { color: t.series(0), width: 2 }, marker: { size: 6, color: t.series(0) },
    }], {
      height: narrow ? 300 : 340, shapes, annotations, margin: { l: 8, r: 16, t: several ? 34 : 16, b: 8 },
      xaxis: { title: { text: "epochs, one experience after the other" }, range: [0.5, epochs.length + 0.5], showgrid: false, ...wholeTicks(epochs.length, narrow) },
      yaxis: { title: { text: "mean loss" }, rangemode: "tozero" },
    }, t);
  }

  function domains(element, data, hidden) {
    const t = theme();
    const narrow = isNarrow();
    const { names, lines, source } = data.domains;
    const at = names.map((_, index) => index + 1);
    const line = (name, errors, colour, extra) => ({
      type: "scatter", mode: "lines+markers", name: plain(name), x: at, y: errors, connectgaps: false, cliponaxis: false,
      hoverinfo: "text", hoverlabel: { bordercolor: colour },
      hovertext: errors.map((error, index) => `<b>${plain(short(name, 44))}</b><br>${plain(short(names[index], 40))}<br>error ${fixed(error)}`),
      ...extra,
    });
    const shown = lines.map(({ group, errors }) => ({ group: data.groups[group], errors })).filter(({ group }) => !hidden.has(group.series));
    const traces = shown.map(({ group, errors }) => {
      const colour = t.series(group.series);
      return line(group.label, errors, colour, {
        line: { color: colour, width: 2, dash: DASHES[Math.floor(group.series / 8) % DASHES.length] },
        marker: { symbol: SYMBOLS[group.series % SYMBOLS.length], color: colour, size: 9, line: { color: t.edge, width: 0.6 } },
      });
    });
    if (source.length) traces.push(line("source model, not adapted", source, t.muted, {
      line: { color: t.muted, width: 2, dash: "dash" }, mode: source.length > 1 ? "lines" : "markers", marker: { color: t.muted, size: 9 },
    }));
    const slanted = names.length > (narrow ? 3 : 8);
    draw(element, traces, {
      height: narrow ? 360 : 430,
      xaxis: {
        range: [1 - 0.03 * Math.max(names.length - 1, 1), names.length + 0.03 * Math.max(names.length - 1, 1)],
        ...(names.length > 40 ? { title: { text: "domain visits" }, ...wholeTicks(names.length, narrow) }
          : { tickmode: "array", tickvals: at, ticktext: names.map((name) => plain(short(name, 18))), ticks: "", tickangle: slanted ? -50 : 0 }),
      },
      yaxis: { title: { text: "error" }, rangemode: "tozero" },
    }, t);
  }

  const onPaper = (on) => { paper = on; };

  return { curves, domains, fixed, front, inWords, losses, matrix, memory, onPaper, plain };
})();
