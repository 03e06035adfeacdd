"use strict";
for (const button of document.querySelectorAll("button[data-figure]")) {
  button.addEventListener("click", () => {
    const size = {width: 1000, height: Math.max(400, Number(button.dataset.height)), scale: 2};
    const name = button.dataset.figure;
    Plotly.downloadImage(name, {format: "png", filename: name, ...size});
  });
}
const figures = document.querySelectorAll(".js-plotly-plot");
addEventListener("beforeprint", () => figures.forEach((one) => Plotly.relayout(one, {width: 640})));
addEventListener("afterprint", () =>
  figures.forEach((one) => Plotly.relayout(one, {width: null, autosize: true})));
