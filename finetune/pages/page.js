"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const read = (id) => ($(id) ? JSON.parse($(id).textContent) : null);
  const make = (tag, name, text) => {
    const made = document.createElement(tag);
    if (name) made.className = name;
    if (text !== undefined) made.textContent = text;
    return made;
  };

  // tables: a click on a heading sorts; again, the other way round; empty cells stay last
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      if (!head.dataset.sort) return;
      head.firstElementChild.addEventListener("click", () => {
        const text = head.dataset.sort === "t";
        const was = head.getAttribute("aria-sort");
        const up = was ? was === "descending" : text;
        heads.forEach((one) => one.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const value = (row) => {
          const cell = row.cells[column];
          return text ? cell.textContent.trim() : cell.dataset.v === "" ? null : Number(cell.dataset.v);
        };
        const order = (a, b) => {
          const [x, y] = [value(a), value(b)];
          if (x === null || y === null) return (x === null) - (y === null);
          return (text ? x.localeCompare(y) : x - y) * (up ? 1 : -1);
        };
        for (const body of table.tBodies) {
          const rows = [...body.rows].filter((row) => !row.classList.contains("head"));
          rows.sort(order).forEach((row) => body.append(row));
        }
      });
    });
  }

  // an example, token by token
  const DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
  const texts = read("texts") || {};
  const reader = $("reader");
  const pieces = (one) => {
    const signs = Array.from(one.text), found = [];
    let at = 0, size = 0;
    for (const digit of one.sizes) {
      const n = DIGITS.indexOf(digit);
      size += n;
      if (n === 63) continue;
      found.push(signs.slice(at, at + size).join(""));
      at += size;
      size = 0;
    }
    return found;
  };
  const within = (edges, at) => {
    for (let i = 0; i + 1 < edges.length; i += 2) if (at >= edges[i] && at < edges[i + 1]) return true;
    return false;
  };
  const coloured = (one, levels) => {
    const page = make("p", "said");
    pieces(one).forEach((piece, at) => {
      if (at && one.starts.includes(at)) page.append("\n— next answer —\n");
      const code = DIGITS.indexOf(levels[at]), hit = code > 31, p = 2 ** (-(code % 32) / 2);
      const tok = make("span", "tok r" + (p >= 0.9 ? 4 : p >= 0.5 ? 3 : p >= 0.2 ? 2 : p >= 0.05 ? 1 : 0), piece);
      if (hit) tok.classList.add("hit");
      if (within(one.style, at)) tok.classList.add("style");
      if (one.first && at >= one.first[0] && at < one.first[1]) tok.classList.add("first");
      tok.title = (p >= 0.995 ? "over 99" : (100 * p).toPrecision(2)) + " %" + (hit ? ", the first choice" : "");
      page.append(tok);
    });
    return page;
  };
  const close = () => {
    if (reader.open) reader.close();
  };
  const show = (key) => {
    const one = texts[key];
    if (!reader || !one) return false;
    const cut = key.indexOf("/"), head = make("header"), shut = make("button", "close", "close");
    shut.type = "button";
    shut.addEventListener("click", close);
    const name = make("h2", "", key.slice(cut + 1));
    name.id = "reader-name";
    head.append(name, shut);
    const place = make("p", "dim", one.place + (one.split === "train" ? "" : " · held out"));
    reader.replaceChildren(head, place, make("p", "said", one.asked));
    if (one.looks.length) {
      reader.append(make("p", "dim", "Stronger colour: likelier. Underlined: the model's first choice, so greedy decoding writes it. Grey: house style, not counted."
        + (one.first ? " Between lines: what was recited first, at epoch " + one.first[2] + "." : "")));
      const sides = make("div", "sides");
      const told = one.looks.map(([epoch, levels]) => ["the adapter at epoch " + epoch, one, levels]);
      if (one.base) told.splice(1, 0, ["the base", { ...one, first: null }, one.base]);
      for (const [name, as, levels] of told) {
        const side = make("div");
        side.append(make("h3", "", name), coloured(as, levels));
        sides.append(side);
      }
      reader.append(sides);
    } else {
      reader.append(make("p", "said", one.text || ""), make("p", "missing", "Its tokens were not kept, or left out to keep this page small."));
    }
    if (!reader.open) reader.showModal();
    reader.scrollTop = 0;
    return true;
  };
  const wanted = () => decodeURIComponent(location.hash.startsWith("#read=") ? location.hash.slice(6) : "");
  const follow = () => {
    if (!wanted() || !show(wanted())) close();
  };
  if (reader) {
    reader.addEventListener("close", () => {
      if (wanted()) history.replaceState(null, "", location.pathname + location.search);
    });
    reader.addEventListener("click", (event) => {
      if (event.target === reader) close();
    });
    for (const button of document.querySelectorAll(".open")) {
      if (texts[button.dataset.example]) {
        button.addEventListener("click", () => {
          location.hash = "read=" + encodeURIComponent(button.dataset.example);
        });
      } else {
        button.disabled = true;
      }
    }
    addEventListener("hashchange", follow);
    try { follow(); } catch (error) { close(); }
  }

  // the heat map tells what a cell means
  const heat = document.querySelector("table.heat"), told = $("cell"), levels = Object.fromEntries(read("levels") || []);
  if (heat && told) {
    const heads = heat.tHead.rows[0].cells;
    heat.addEventListener("pointerover", (event) => {
      const cell = event.target.closest("td.c");
      if (!cell) return;
      const level = /\bh(\w)\b/.exec(cell.className)[1];
      told.textContent = cell.parentElement.cells[0].textContent.trim() + ", epoch " + heads[cell.cellIndex].dataset.epoch + ": " + levels[level === "n" ? "-" : level];
    });
  }

  // a running run's page looks again by itself, unless someone reads closely
  const every = Number(document.body.dataset.refresh || 0);
  if (every) {
    setInterval(() => {
      const busy = (reader && reader.open) || !getSelection().isCollapsed || document.hidden;
      if (!busy) location.reload();
    }, every * 1000);
  }
  const kept = "along";
  for (const radio of document.querySelectorAll(".switched > input")) {
    try {
      if (sessionStorage.getItem(kept) === radio.id) radio.checked = true;
      radio.addEventListener("change", () => sessionStorage.setItem(kept, radio.id));
    } catch (error) { /* a page from a file may have no storage */ }
  }
})();
