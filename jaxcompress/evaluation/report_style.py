"""The style of `report.html`: light and dark, wide and narrow, and on paper."""

PALETTE = """
:root{color-scheme:light dark;--page:#fff;--ink:#1b1f24;--muted:#5f6b78;--rule:#e1e5ea;
--line:#bcc5cf;--panel:#f6f7f9;--first:#0b62a8;--second:#b8520f;--good:#197741;--bad:#b8302a}
@media screen and (prefers-color-scheme:dark){:root{--page:#14171a;--ink:#e6e8ea;--muted:#9aa5b1;
--rule:#2c333a;--line:#4b5661;--panel:#1c2025;--first:#6cb2f2;--second:#f0a35e;--good:#5cc58c;--bad:#f2857b}}
"""

STYLE = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0 auto;max-width:74rem;padding:2rem 1.25rem 4rem;background:var(--page);
color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif}
h1{font-size:1.7rem;line-height:1.2;margin:.2rem 0 .3rem;overflow-wrap:anywhere}
h2{font-size:1.1rem;margin:2.6rem 0 .7rem;padding-bottom:.3rem;border-bottom:1px solid var(--rule)}
p{margin:.3rem 0;max-width:46rem}
.muted,figcaption,th,dt{color:var(--muted)}
.small,figcaption{font-size:.85rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(15rem,1fr));gap:.8rem;
margin:1.3rem 0 0}
.tile{background:var(--panel);border-radius:.5rem;padding:.9rem 1.1rem}
.tile b{display:block;font-size:1.65rem;line-height:1.25;font-weight:650}
.good{color:var(--good)}.bad{color:var(--bad)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.87rem;width:100%}
th,td{padding:.4rem .45rem;text-align:right;white-space:nowrap;vertical-align:baseline;
border-bottom:1px solid var(--rule)}
th{font-weight:500;font-size:.8rem;line-height:1.3;vertical-align:bottom;white-space:normal}
th:first-child,td:first-child,.text{text-align:left}
td:first-child{white-space:normal;min-width:8rem}
.stages td:first-child{position:sticky;left:0;background:var(--page)}
td small{display:block;color:var(--muted);white-space:normal;max-width:17rem;
overflow-wrap:break-word}
td .muted{margin-left:.25em}
.whole{white-space:nowrap}.wrap{min-width:13rem;white-space:normal;overflow-wrap:anywhere}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(26rem,100%),1fr));
gap:1.4rem 2rem}
figure{margin:0;min-width:0}
figure b{display:block;font-weight:600}
figcaption{overflow-wrap:anywhere}
svg{display:block;width:100%;height:auto;max-width:36rem}
svg text{font-family:inherit}
.dot{display:inline-block;width:.7em;height:.7em;border-radius:50%;margin:0 .3em 0 .1em;
border:1.5px solid var(--first);background:var(--first)}
.hollow{background:var(--page)}
dl{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:.25rem 1rem;margin:.5rem 0}
dd{margin:0;overflow-wrap:anywhere}
code,pre{font:.85em/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre{background:var(--panel);border-radius:.5rem;padding:.8rem 1rem;overflow-x:auto;
white-space:pre-wrap;overflow-wrap:anywhere}
ul{list-style:none;padding:0;margin:0}
li{padding:.3rem 0 .3rem 1.5rem;position:relative;overflow-wrap:anywhere}
li>b:first-child{position:absolute;left:0}
@media (max-width:32rem){body{padding:1.2rem .9rem 3rem}h1{font-size:1.4rem}
dl{grid-template-columns:1fr;gap:0}dt{margin-top:.5rem}td small{max-width:9rem}
th{white-space:nowrap}}
@media print{html{font-size:11px}body{max-width:none;padding:0;font-size:11px}h2{break-after:avoid}
figure,.tile,tr,li{break-inside:avoid}.scroll{overflow:visible}
.stages td:first-child{position:static}
.tiles{grid-template-columns:repeat(3,1fr)}.plots{grid-template-columns:1fr 1fr}
th,td{padding:.25rem .3rem}table{font-size:8.5px}th{font-size:8px;white-space:normal}
td small{max-width:11rem}.tile{border:1px solid var(--rule)}}
"""
