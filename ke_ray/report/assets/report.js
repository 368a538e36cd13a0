// The page: Vega draws each figure when it comes into view; menus, tables and exports around it.
(() => {
  "use strict";
  const root = document.documentElement;
  const read = (node) => JSON.parse(node.textContent);
  const themes = read(document.getElementById("themes"));

  // ---- light and dark ----------------------------------------------------------------------
  const button = document.getElementById("theme");
  const names = { auto: "as the system", light: "light", dark: "dark" };
  const system = matchMedia("(prefers-color-scheme: dark)");
  const theme = () => root.dataset.theme !== "auto" ? root.dataset.theme : system.matches ? "dark" : "light";
  const setTheme = (value) => {
    root.dataset.theme = value;
    button.textContent = "Colours: " + names[value];
    redraw();
  };
  button.addEventListener("click", () => setTheme({ auto: "light", light: "dark", dark: "auto" }[root.dataset.theme]));
  system.addEventListener("change", () => redraw());

  // ---- rows --------------------------------------------------------------------------------
  // Rows are kept as columns, and texts as numbers into a list.
  const readRows = (id) => {
    const columns = Object.entries(read(document.getElementById(id))).map(([name, values]) =>
      [name, values.names ? values.at.map((at) => at < 0 ? null : values.names[at]) : values]);
    return columns[0][1].map((_, i) => Object.fromEntries(columns.map(([name, values]) => [name, values[i]])));
  };
  const tables = new Map();
  const rowsOf = (panel) => {
    if (!tables.has(panel.rows)) tables.set(panel.rows, readRows(panel.rows));
    return tables.get(panel.rows);
  };
  const shown = (value) => value === null || value === undefined ? "–"
    : typeof value !== "number" ? String(value)
    : Number.isInteger(value) ? value.toLocaleString("en-US").replace("-", "−")
    : String(Number(value.toPrecision(6))).replace("-", "−");

  // [headings, ...rows] of a view, for its table and its CSV.
  const tableOf = (panel) => {
    if (panel.table) return panel.table;
    const rows = rowsOf(panel);
    const fields = Object.keys(panel.columns);
    if (!panel.spread) return [Object.values(panel.columns), ...rows.map((row) => fields.map((name) => row[name]))];
    const fixed = fields.filter((name) => name !== panel.spread && name !== panel.value);
    const spread = [...new Set(rows.map((row) => row[panel.spread]))];
    const lines = new Map();
    rows.forEach((row) => {
      const head = fixed.map((name) => row[name]), key = JSON.stringify(head);
      if (!lines.has(key)) lines.set(key, [head, new Map()]);
      lines.get(key)[1].set(row[panel.spread], row[panel.value]);
    });
    return [[...fixed.map((name) => panel.columns[name]), ...spread.map((value) => `${panel.columns[panel.spread]} ${value}`)],
      ...[...lines.values()].map(([head, cells]) => [...head, ...spread.map((value) => cells.get(value))])];
  };
  const htmlTable = ([head, ...body]) => {
    const table = document.createElement("table");
    const top = table.createTHead().insertRow();
    head.forEach((name) => {
      const cell = document.createElement("th");
      cell.scope = "col"; cell.textContent = name; top.append(cell);
    });
    const tbody = table.createTBody();
    body.forEach((row) => {
      const line = tbody.insertRow();
      row.forEach((value) => { line.insertCell().textContent = shown(value); });
    });
    return table;
  };

  // ---- drawing -----------------------------------------------------------------------------
  const figures = new Map();  // figure element -> { panels, specs, panel, view, wanted }

  const draw = async (figure) => {
    const state = figures.get(figure), { panel } = state, target = figure.querySelector(".plot");
    const turn = state.turn = (state.turn ?? 0) + 1;  // a later call overtakes this one
    state.view?.finalize();
    state.view = null;
    figure.querySelectorAll("[data-export=png], [data-export=svg]").forEach((node) => { node.disabled = Boolean(panel.table); });
    if (panel.table) return target.replaceChildren(htmlTable(panel.table));
    const rows = rowsOf(panel);
    const spec = { ...state.specs[panel.spec], datasets: { rows },
      description: `${figure.querySelector("h3").textContent}. ${figure.querySelector("figcaption").textContent}` };
    const result = await vegaEmbed(target, spec,
      { actions: false, config: themes[theme()], tooltip: { theme: theme() } });
    if (turn !== state.turn) return result.finalize();
    state.view = result.view;
    figure.dataset.drawn = JSON.stringify(panel.key);
  };
  // Figures are drawn one after the other, those on the screen first: a reader need not wait for
  // what is out of sight.
  const waiting = new Set();
  let drawing = false;
  const onScreen = (figure) => {
    const { top, bottom } = figure.getBoundingClientRect();
    return top < innerHeight && bottom > 0;
  };
  const drawInTurn = async (figure) => {
    figures.get(figure).wanted = true;
    waiting.add(figure);
    if (drawing) return;
    drawing = true;
    while (waiting.size) {
      const next = [...waiting].find(onScreen) ?? [...waiting][0];
      waiting.delete(next);
      await draw(next).catch(console.error);
      await new Promise((resume) => { requestAnimationFrame(() => setTimeout(resume)); });  // shows it
    }
    drawing = false;
  };
  const redraw = () => figures.forEach((state, figure) => { if (state.wanted) drawInTurn(figure); });
  const near = new IntersectionObserver((entries) => entries.forEach(({ isIntersecting, target }) => {
    if (!isIntersecting) return;
    near.unobserve(target);
    drawInTurn(target);
  }), { rootMargin: "400px" });
  addEventListener("beforeprint", () => figures.forEach((state, figure) => {
    if (!state.wanted) drawInTurn(figure);
  }));

  // A view that does not exist (a measure without layers, say) falls back to the nearest one.
  const choose = (figure, changed) => {
    const state = figures.get(figure);
    const selects = [...figure.querySelectorAll("select[data-control]")];
    const score = ({ key }) => key.reduce((sum, part, i) =>
      sum + (part === selects[i].value ? (i === changed ? 100 : 1) : 0), 0);
    state.panel = state.panels.reduce((a, b) => score(b) > score(a) ? b : a);
    selects.forEach((select, i) => { select.value = state.panel.key[i]; });
    state.at = null;
    figure.querySelector(".readout").textContent = "";
    fillTable(figure);
    draw(figure);
  };
  const fillTable = (figure) => {
    const details = figure.querySelector("details.numbers");
    details.querySelector(".scroll").replaceChildren(...details.open ? [htmlTable(tableOf(figures.get(figure).panel))] : []);
  };

  // Arrow keys read out one value after the other.
  const readOut = (figure, move) => {
    const state = figures.get(figure);
    if (state.panel.table) return;
    const rows = rowsOf(state.panel).filter((row) => row[state.panel.value] !== null);
    state.at = ((state.at ?? (move > 0 ? -1 : 0)) + move + rows.length) % rows.length;
    figure.querySelector(".readout").textContent = Object.entries(state.panel.columns)
      .filter(([name]) => (rows[state.at][name] ?? null) !== null)
      .map(([name, title]) => `${title}: ${shown(rows[state.at][name])}`).join(", ");
  };

  // ---- export ------------------------------------------------------------------------------
  const save = (address, name) => {
    const link = document.createElement("a");
    link.href = address;
    link.download = name;
    link.click();
  };
  const saveText = (text, type, name) => {
    const address = URL.createObjectURL(new Blob([text], { type }));
    save(address, name);
    setTimeout(() => URL.revokeObjectURL(address), 5000);
  };
  const quote = (v) => v === null || v === undefined ? "" : /[",\n]/.test(v) ? `"${String(v).replaceAll('"', '""')}"` : String(v);
  const exportFigure = async (figure, kind) => {
    const { panel, view } = figures.get(figure), name = `${figure.id}.${kind}`;
    if (kind === "csv") return saveText(tableOf(panel).map((row) => row.map(quote).join(",")).join("\n") + "\n", "text/csv", name);
    if (kind === "svg") return saveText(await view.toSVG(), "image/svg+xml", name);
    save(await view.toImageURL("png", 2), name);
  };

  document.querySelectorAll("figure").forEach((figure) => {
    const { panels, specs } = read(figure.querySelector('script[type="application/json"]'));
    figures.set(figure, { panels, specs, panel: panels[0] });
    near.observe(figure);
    figure.querySelectorAll("select[data-control]").forEach((select, i) =>
      select.addEventListener("change", () => choose(figure, i)));
    figure.querySelectorAll("[data-export]").forEach((node) =>
      node.addEventListener("click", () => exportFigure(figure, node.dataset.export)));
    figure.querySelector("details.numbers").addEventListener("toggle", () => fillTable(figure));
    figure.querySelector(".plot").addEventListener("keydown", (event) => {
      const move = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!move) return;
      event.preventDefault();
      readOut(figure, move);
    });
  });
})();
