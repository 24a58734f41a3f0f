// report.md as elements: headings, paragraphs, lists, tables, pictures and `code`, which is all that a report uses.
// Text stays text: nothing of a report is ever read as HTML, but for <br> in a table's cell, which breaks the line.
// Knows neither the page nor the API.

const PICTURE = /^!\[(.*)\]\((.*)\)$/;
const HEADING = /^(#{1,3}) (.*)$/;
const BEGINS = [PICTURE, HEADING, /^\|/, /^- /, /^\s*$/];

/** Elements of `text`; `element(tag, properties, ...children)` makes them, `picture(file, title)` those of pictures. */
export function markdown(text, element, picture) {
  const lines = text.split("\n");
  const made = [];
  let at = 0;
  const lasting = (belongs) => {
    const from = at;
    do at += 1; while (at < lines.length && belongs(lines[at]));
    return lines.slice(from, at);
  };
  const inline = (part) => part.split("`").map((piece, place) =>
    place % 2 ? element("code", { textContent: piece }) : piece);
  while (at < lines.length) {
    const line = lines[at];
    const [, marks, title] = HEADING.exec(line) ?? [];
    const [, name, file] = PICTURE.exec(line) ?? [];
    if (!line.trim()) at += 1;
    else if (marks) { made.push(element(`h${marks.length + 2}`, {}, ...inline(title))); at += 1; }
    else if (file) { made.push(picture(file, name)); at += 1; }
    else if (line.startsWith("|")) made.push(table(lasting((next) => next.startsWith("|")), element, inline));
    else if (line.startsWith("- ")) made.push(element("ul", { className: "bullets" },
      ...lasting((next) => next.startsWith("- ")).map((item) => element("li", {}, ...inline(item.slice(2))))));
    else made.push(element("p", {}, ...inline(lasting((next) => !BEGINS.some((form) => form.test(next))).join(" "))));
  }
  return made;
}

function table(lines, element, inline) {
  const broken = (cell) => cell.split("<br>").flatMap((part, place) => [...(place ? [element("br")] : []), ...inline(part)]);
  const cells = (line, tag) => line.replace(/^\||\|\s*$/g, "").split(/(?<!\\)\|/)
    .map((cell) => element(tag, {}, ...broken(cell.trim().replaceAll("\\|", "|"))));
  const [head, , ...rows] = lines;
  return element("div", { className: "wide" }, element("table", {},
    element("thead", {}, element("tr", {}, ...cells(head, "th"))),
    element("tbody", {}, ...rows.map((row) => element("tr", {}, ...cells(row, "td"))))));
}
