"""`poprisk report`: one page about one or more runs, made from their own text logs.

    command   what is asked for, checked and printed
    sources   which files belong to a run, and what they say; never a pickle
    run       all of it together; numbers, names and texts made fit to be shown
    charts    the table of all charts, and how what was logged or measured becomes one
    findings  what happened, in sentences and key figures
    draw      a chart as PNG, or as SVG that follows the page's colours
    labels    the part on wrong labels: margins, groups, the most suspect pairs and their texts
    page      what is written: pictures, and the page by page.html.j2, page.css and page.js

Nothing is imported here, nor by `command` before it runs: the rest needs matplotlib and pandas.
"""
