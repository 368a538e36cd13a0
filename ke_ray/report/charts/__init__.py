"""Charts from result files: each described once, drawn by the page, the dashboard and the picture.

figure       a titled set of views, with the rows behind them
plot, theme  the kinds of charts, and the colours of all of them
scan, continual, dynamics, sweep, comparison    one module per kind of result
"""
