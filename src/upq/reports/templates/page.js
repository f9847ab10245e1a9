"use strict";
// Colours of text and axes are the page's: currentColor follows light, dark and print without drawing anew.
const soft = { labelColor: "currentColor", titleColor: "currentColor", labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal" };
const config = {
  background: null,
  font: "system-ui, sans-serif",
  view: { stroke: null },
  axis: { ...soft, gridColor: "currentColor", gridOpacity: 0.15, domainColor: "currentColor", tickColor: "currentColor", labelLimit: 200 },
  legend: { ...soft, labelLimit: 260, symbolStrokeWidth: 2 },
};
for (const figure of document.querySelectorAll("figure.chart")) {
  const spec = JSON.parse(figure.querySelector("script").textContent);
  vegaEmbed(figure.querySelector(".picture"), spec, { renderer: "svg", actions: false, config }).then(
    // The picture is one image with a description; the table below it has the numbers.
    () => figure.querySelector("svg").setAttribute("aria-hidden", "true"),
    (error) => {
      console.error(error);
      figure.querySelector("details").open = true;
    },
  );
}
