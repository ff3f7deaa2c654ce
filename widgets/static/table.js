function render({ model, el }) {
  el.classList.add("wb-table");
  const bar = document.createElement("div");
  bar.className = "wb-table-bar";
  const caption = document.createElement("span");
  caption.className = "wb-muted";
  const copy = document.createElement("button");
  copy.type = "button";
  copy.className = "jupyter-button";
  copy.textContent = "Copy as CSV";
  bar.append(caption, copy);
  const box = document.createElement("div");
  box.className = "wb-table-box";
  const table = document.createElement("table");
  const head = table.createTHead();
  const body = table.createTBody();
  box.append(table);
  el.append(bar, box);
  let sort = { column: -1, up: true };

  const ordered = () => {
    const rows = [...model.get("rows")];
    const { column, up } = sort;
    if (column < 0) return rows;
    const compare = (a, b) => {
      const [x, y] = [a.sort[column], b.sort[column]];
      if (x === null || y === null) return (x === null) - (y === null); // unknown values stay last either way
      const order = typeof x === "number" ? x - y : String(x).localeCompare(String(y));
      return up ? order : -order;
    };
    return rows.sort(compare);
  };

  const drawHead = () => {
    const row = document.createElement("tr");
    model.get("columns").forEach((column, index) => {
      const cell = document.createElement("th");
      cell.scope = "col";
      cell.className = column.number ? "wb-number" : "";
      const on = sort.column === index;
      cell.setAttribute("aria-sort", on ? (sort.up ? "ascending" : "descending") : "none");
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = column.label + (on ? (sort.up ? " ▲" : " ▼") : "");
      button.title = `Sort by ${column.label || "number"}`;
      button.onclick = () => {
        sort = on ? { column: index, up: !sort.up } : { column: index, up: true };
        draw();
      };
      cell.append(button);
      row.append(cell);
    });
    head.replaceChildren(row);
  };

  // a cell to write in; what is written is said when it is left
  const writable = (row, index, label) => {
    const input = document.createElement("input");
    input.type = "text";
    input.value = row.cells[index];
    input.placeholder = model.get("hint");
    input.setAttribute("aria-label", `${label} of ${row.cells[0]}`);
    const fault = model.get("faults")[row.key];
    input.title = fault ?? "";
    input.setAttribute("aria-invalid", fault !== undefined);
    input.onfocus = () => {
      if (model.get("pickable")) model.send({ kind: "pick", key: row.key });
    };
    input.onblur = () => {
      if (input.value !== row.cells[index]) model.send({ kind: "edit", key: row.key, text: input.value });
    };
    return input;
  };

  const drawBody = () => {
    const columns = model.get("columns");
    const active = el.getRootNode().activeElement;
    const typing = active && body.contains(active) && active.tagName === "INPUT" ? active : null;
    const at = typing && { key: typing.closest("tr").dataset.key, text: typing.value, caret: typing.selectionStart };
    if (typing) typing.onblur = null; // it is taken away, not left
    body.replaceChildren(
      ...ordered().map((row) => {
        const line = document.createElement("tr");
        line.dataset.key = row.key;
        if (row.strong) line.classList.add("wb-strong");
        // a row with a cell to write in is reached by that cell
        line.tabIndex = model.get("pickable") && model.get("editable") < 0 ? 0 : -1;
        row.cells.forEach((text, index) => {
          const cell = document.createElement("td");
          if (columns[index].number) cell.className = "wb-number";
          if (index === model.get("editable")) cell.append(writable(row, index, columns[index].label));
          else {
            cell.textContent = text;
            if (!columns[index].number) cell.title = text; // long names are cut
          }
          line.append(cell);
        });
        return line;
      }),
    );
    if (!model.get("rows").length) {
      const cell = document.createElement("td");
      cell.colSpan = Math.max(columns.length, 1);
      cell.className = "wb-muted";
      cell.textContent = model.get("empty");
      const line = document.createElement("tr");
      line.append(cell);
      body.append(line);
    }
    if (at) {
      // rows come anew after each edit, when the next cell is being written in already
      const input = [...body.rows].find((line) => line.dataset.key === at.key)?.querySelector("input");
      if (input) {
        input.value = at.text;
        input.focus({ preventScroll: true });
        input.setSelectionRange(at.caret, at.caret);
      }
    }
  };

  const drawSelected = (reveal) => {
    const keys = new Set(model.get("selected").map(String));
    let first = null;
    for (const line of body.rows) {
      const on = keys.has(line.dataset.key);
      line.classList.toggle("wb-selected", on);
      line.setAttribute("aria-selected", on);
      if (on) first ??= line;
    }
    if (first && reveal) {
      // only the table's own box scrolls: scrollIntoView would move the notebook as well
      const above = first.offsetTop - head.offsetHeight - box.scrollTop;
      const below = first.offsetTop + first.offsetHeight - box.scrollTop - box.clientHeight;
      if (above < 0) box.scrollTop += above;
      else if (below > 0) box.scrollTop += below;
    }
  };

  const draw = () => {
    caption.textContent = model.get("caption");
    table.setAttribute("aria-label", model.get("caption"));
    el.classList.toggle("wb-pickable", model.get("pickable"));
    box.style.height = model.get("height");
    drawHead();
    drawBody();
    drawSelected(false);
  };

  const pick = (event) => {
    const line = event.target.closest("tr[data-key]");
    if (line && model.get("pickable")) model.send({ kind: "pick", key: line.dataset.key });
  };
  body.addEventListener("click", pick);
  body.addEventListener("keydown", (event) => {
    if (event.target.matches("input")) {
      const next = event.target.closest("tr").nextElementSibling?.querySelector("input");
      if (event.key === "Enter") (next ? next.focus() : event.target.blur());
      return;
    }
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      pick(event);
    }
  });

  const quoted = (text) => (/[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  copy.onclick = async () => {
    const lines = [model.get("columns").map((c) => c.label), ...ordered().map((r) => r.cells)];
    const text = lines.map((cells) => cells.map((c) => quoted(String(c))).join(",")).join("\n") + "\n";
    copy.textContent = (await copied(text, el)) ? "Copied" : "Copying is not allowed here";
    setTimeout(() => (copy.textContent = "Copy as CSV"), 1500);
  };

  for (const name of ["columns", "rows", "caption", "height", "pickable", "empty", "editable", "hint", "faults"]) model.on(`change:${name}`, draw);
  model.on("change:selected", () => drawSelected(true));
  draw();
}

export default { render };
