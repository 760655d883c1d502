(function () {
  "use strict";
  // Draws the chosen setting into the picture that is there; playground_charts.py drew the first.
  var data = JSON.parse(document.getElementById("data").textContent), g = data.geometry;
  var slider = document.getElementById("noise"), share = document.getElementById("share");
  var rates = [].slice.call(document.querySelectorAll("input[name=rate]"));
  function byId(id) { return document.getElementById(id); }
  function number(v) { return String(Math.floor(v * 10 + 0.5) / 10); }
  function xOf(epoch) {
    return g.left + (g.width - g.left - g.right) * Math.sqrt(epoch / g.epochs);
  }
  function yOf(chart, value) {
    var part = chart.log
      ? Math.log2(chart.high / Math.max(value, 1)) / Math.log2(chart.high / chart.low)
      : (chart.high - value) / (chart.high - chart.low);
    return g.top + g.plot * part;
  }
  function joined(points) {
    return points.map(function (p) { return number(p[0]) + "," + number(p[1]); }).join("L");
  }
  function shown(chart, value, bare) {
    return chart.unit === 100 ? (value / 100).toFixed(2)
      : (value / 10).toFixed(1) + (bare ? "" : " %");
  }
  function fill(body, rows) {
    body.textContent = "";
    rows.forEach(function (row) {
      var line = document.createElement("tr");
      row.forEach(function (text, index) {
        var cell = document.createElement(index ? "td" : "th");
        if (!index) { cell.setAttribute("scope", "row"); }
        cell.textContent = text;
        line.appendChild(cell);
      });
      body.appendChild(line);
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
    var said = arms.map(function (arm, place) {
      var means = arm[chart.id][0], below = arm[chart.id][1], above = arm[chart.id][2];
      var line = [], upper = [], lower = [];
      means.forEach(function (mean, index) {
        var x = xOf(index + chart.first);
        line.push([x, yOf(chart, mean)]);
        upper.push([x, yOf(chart, mean + above[index])]);
        lower.unshift([x, yOf(chart, mean - below[index])]);
      });
      byId(chart.id + "-l" + place).setAttribute("d", "M" + joined(line));
      byId(chart.id + "-b" + place).setAttribute("d", "M" + joined(upper.concat(lower)) + "Z");
      if (chart.mark) { mark(chart, byId(chart.id + "-m" + place), arm.stop); }
      var top = Math.max.apply(null, means), last = means.length - 1;
      return g.names[place] + ": " + shown(chart, means[0]) + " in epoch " + chart.first
        + ", highest " + shown(chart, top) + " in epoch " + (means.indexOf(top) + chart.first)
        + ", " + shown(chart, means[last]) + " in epoch " + (last + chart.first) + ".";
    });
    byId(chart.id + "-desc").textContent = said.join(" ");
    fill(byId(chart.id + "-rows"), g.tableEpochs.filter(function (epoch) {
      return epoch >= chart.first;
    }).map(function (epoch) {
      return [String(epoch)].concat(arms.map(function (arm) {
        var at = epoch - chart.first, v = arm[chart.id], mean = v[0][at];
        return shown(chart, mean) + " (" + shown(chart, mean - v[1][at], true) + " to "
          + shown(chart, mean + v[2][at], true) + ")";
      }));
    }));
  }
  function mark(chart, element, stop) {
    if (!stop) {
      element.setAttribute("visibility", "hidden");
      element.setAttribute("transform", "translate(0,0)");
      return;
    }
    var y = Math.min(Math.max(yOf(chart, stop[chart.mark]), g.top), g.top + g.plot);
    element.setAttribute("visibility", "visible");
    element.setAttribute("transform", "translate(" + number(xOf(stop[0])) + "," + number(y) + ")");
  }
  function drawRates(lasts, chosen) {
    var chart = g.charts[0];
    byId("rates-here").setAttribute("x", number(g.ratePlaces[chosen] - 22));
    lasts.forEach(function (values, place) {
      var points = values.map(function (value, index) {
        var point = [g.ratePlaces[index], yOf(chart, value)];
        byId("rates-m" + place + "-" + index).setAttribute(
          "transform", "translate(" + number(point[0]) + "," + number(point[1]) + ")");
        return point;
      });
      byId("rates-l" + place).setAttribute("d", "M" + joined(points));
    });
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
      return [g.names[place]].concat(cells);
    }));
    g.charts.forEach(function (chart) { drawChart(chart, setting.arms); });
    drawRates(data.lasts[row], chosen);
  }
  slider.addEventListener("input", draw);
  rates.forEach(function (one) { one.addEventListener("change", draw); });
  [].slice.call(document.querySelectorAll("#lines input")).forEach(function (box) {
    box.addEventListener("change", function () {
      byId("charts").classList.toggle("off" + box.value, !box.checked);
    });
  });
  byId("controls").hidden = byId("lines").hidden = false;
})();
