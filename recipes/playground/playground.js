(function () {
  "use strict";
  var data = JSON.parse(document.getElementById("data").textContent);
  var slider = document.getElementById("noise"), share = document.getElementById("share");
  var rates = [].slice.call(document.querySelectorAll("input[name=rate]"));
  var width = 350, plot = 150, left = 40, right = 12, top = 8;
  var tableEpochs = [0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50];
  var names = data.arms.map(function (arm) { return arm.name; });
  function byId(id) { return document.getElementById(id); }
  function number(v) { return String(Math.floor(v * 10 + 0.5) / 10); }
  function xOf(epoch) { return left + (width - left - right) * Math.sqrt(epoch / data.epochs); }
  function yOf(chart, value) {
    var low = chart.ticks[0], high = chart.ticks[chart.ticks.length - 1];
    var part = chart.log ? Math.log2(high / Math.max(value, 1)) / Math.log2(high / low)
      : (high - value) / (high - low);
    return top + plot * part;
  }
  function shown(chart, value, bare) {
    return chart.unit === 100 ? (value / 100).toFixed(2)
      : (value / 10).toFixed(1) + (bare ? "" : " %");
  }
  // All that gets into a picture are numbers and the names of this file.
  function element(name, attributes, text) {
    var parts = Object.keys(attributes).map(function (key) {
      return " " + key + '="' + attributes[key] + '"';
    });
    return "<" + name + parts.join("") + ">" + (text === undefined ? "" : text) + "</" + name + ">";
  }
  function path(name, id, d, more) {
    return element("path", Object.assign({ "class": name, id: id, d: d }, more || {}));
  }
  function line(points) {
    return "M" + points.map(function (p) { return number(p[0]) + "," + number(p[1]); }).join("L");
  }
  function across(name, y) {
    return element("line", { "class": name, x1: left, x2: width - right, y1: y, y2: y });
  }
  function moved(x, y) { return { transform: "translate(" + number(x) + "," + number(y) + ")" }; }
  function frame(chart, id, title, said, xTicks, xLabel) {
    var text = element("title", { id: id + "-title" }, title)
      + element("desc", { id: id + "-desc" }, said)
      + element("clipPath", { id: id + "-clip" }, element("rect",
        { x: left, y: top, width: width - left - right, height: plot }));
    chart.ticks.forEach(function (value) {
      var y = yOf(chart, value);
      text += across("grid", number(y)) + element("text",
        { x: left - 5, y: number(y + 3.5), "text-anchor": "end" },
        chart.unit === 100 ? value / 100 : Math.floor(value / 10) + " %");
    });
    xTicks.concat([[(left + width - right) / 2, xLabel, 28]]).forEach(function (tick) {
      text += element("text", { x: number(tick[0]), y: top + plot + (tick[2] || 14),
        "text-anchor": "middle" }, tick[1]);
    });
    return text;
  }
  function fill(body, rows) {
    body.textContent = "";
    rows.forEach(function (row) {
      var cells = document.createElement("tr");
      row.forEach(function (text, index) {
        var cell = document.createElement(index ? "td" : "th");
        if (!index) { cell.setAttribute("scope", "row"); }
        cell.textContent = text;
        cells.appendChild(cell);
      });
      body.appendChild(cells);
    });
  }
  function list(element, texts) {
    element.textContent = "";
    (texts.length ? texts : ["Nothing."]).forEach(function (text) {
      var item = document.createElement("li");
      item.textContent = text;
      element.appendChild(item);
    });
  }
  function drawChart(chart, arms) {
    var inside = "", marks = "";
    var said = arms.map(function (arm, place) {
      var means = arm[chart.id][0], below = arm[chart.id][1], above = arm[chart.id][2];
      var middle = [], upper = [], lower = [];
      means.forEach(function (mean, index) {
        var x = xOf(index + chart.first);
        middle.push([x, yOf(chart, mean)]);
        upper.push([x, yOf(chart, mean + above[index])]);
        lower.unshift([x, yOf(chart, mean - below[index])]);
      });
      inside += path("band a" + place, chart.id + "-b" + place, line(upper.concat(lower)) + "Z")
        + path("line a" + place, chart.id + "-l" + place, line(middle));
      if (chart.mark && arm.stop) {  // AdamW on top
        var y = Math.min(Math.max(yOf(chart, arm.stop[chart.mark]), top), top + plot);
        marks = path("mark a" + place, chart.id + "-m" + place, data.arms[place].mark,
          moved(xOf(arm.stop[0]), y)) + marks;
      }
      var highest = Math.max.apply(null, means), last = means.length - 1;
      return names[place] + ": " + shown(chart, means[0]) + " in epoch " + chart.first
        + ", highest " + shown(chart, highest) + " in epoch "
        + (means.indexOf(highest) + chart.first) + ", " + shown(chart, means[last])
        + " in epoch " + (last + chart.first) + ".";
    });
    var ticks = [0, 1, 3, 6, 10, 20, 30, 40, 50, 60].filter(function (epoch) {
      return epoch <= data.epochs;
    }).map(function (epoch) { return [xOf(epoch), epoch]; });
    byId(chart.id).innerHTML = frame(chart, chart.id, chart.title, said.join(" "), ticks,
      "epoch (the first ones stretched)")
      + (chart.log ? across("one", number(yOf(chart, 100))) : "")
      + element("g", { "clip-path": "url(#" + chart.id + "-clip)" }, inside) + marks;
    var epochs = tableEpochs.filter(function (epoch) {
      return epoch >= chart.first && epoch < data.epochs;
    }).concat([data.epochs]);
    fill(byId(chart.id + "-rows"), epochs.map(function (epoch) {
      return [String(epoch)].concat(arms.map(function (arm) {
        var at = epoch - chart.first, v = arm[chart.id], mean = v[0][at];
        return shown(chart, mean) + " (" + shown(chart, mean - v[1][at], true) + " to "
          + shown(chart, mean + v[2][at], true) + ")";
      }));
    }));
  }
  function drawRates(lasts, chosen) {
    var chart = data.charts[0], count = data.rates.length, inside = "";
    var places = data.rates.map(function (rate, index) {
      return left + Math.floor((width - left - right) * (2 * index + 1) / (2 * count));
    });
    inside += element("rect", { id: "rates-here", "class": "here", x: places[chosen] - 22, y: top,
      width: 44, height: plot });
    lasts.forEach(function (values, place) {
      var points = values.map(function (value, index) { return [places[index], yOf(chart, value)]; });
      inside += path("line a" + place, "rates-l" + place, line(points));
      points.forEach(function (point, index) {
        inside += path("mark a" + place, "rates-m" + place + "-" + index, data.arms[place].mark,
          moved(point[0], point[1]));
      });
    });
    byId("rates").innerHTML = frame(chart, "rates", "Accuracy at the last epoch, by learning rate",
      "The numbers are in the table of results of each learning rate.",
      data.rates.map(function (rate, index) { return [places[index], rate]; }), "learning rate")
      + element("g", { "clip-path": "url(#rates-clip)" }, inside);
    fill(byId("rates-rows"), data.rates.map(function (rate, index) {
      return [rate].concat(lasts.map(function (values) {
        return (values[index] / 10).toFixed(1) + " %";
      }));
    }));
  }
  function draw() {
    var row = Number(slider.value);
    var chosen = Number(rates.filter(function (one) { return one.checked; })[0].value);
    var setting = data.settings[row][chosen];
    share.textContent = data.noises[row] + " %";
    slider.setAttribute("aria-valuetext", share.textContent);
    byId("setting").textContent = setting.name;
    byId("headline").textContent = setting.headline;
    ["better", "worse", "unclear"].forEach(function (kind) { list(byId(kind), setting[kind]); });
    fill(byId("results"), setting.results.map(function (cells, place) {
      return [names[place]].concat(cells);
    }));
    data.charts.forEach(function (chart) { drawChart(chart, setting.arms); });
    drawRates(data.lasts[row], chosen);
  }
  slider.addEventListener("input", draw);
  rates.forEach(function (one) { one.addEventListener("change", draw); });
  [].slice.call(document.querySelectorAll("#lines input")).forEach(function (box) {
    box.addEventListener("change", function () {
      byId("charts").classList.toggle("off" + box.value, !box.checked);
    });
  });
  byId("controls").hidden = byId("charts").hidden = false;
  draw();
})();
