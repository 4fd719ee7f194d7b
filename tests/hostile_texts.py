"""Texts that a page must show and not obey, as a model or a person may write them."""

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)><svg><script>alert(1)</script></svg>",
    "<iframe src='javascript:alert(1)'></iframe><object data='http://evil.example/x'></object>",
    "<a href='javascript:alert(1)' autofocus onfocus=alert(1)>x</a>",
    "<link rel=stylesheet href=http://evil.example/x.css><style>*{background:url(http://evil.example/y)}</style>",
    "<meta http-equiv=refresh content='0;url=http://evil.example'><base href=http://evil.example>",
    "![x](http://evil.example/x.png) [y](javascript:alert(1)) http://evil.example/z",
    "{{constructor.constructor('alert(1)')()}} ${alert(1)} </textarea></div></main><h1>Second answer</h1>",
    "&lt;b&gt; &amp; &#x3c;script&#x3e; \\u003cscript\\u003e %3Cscript%3E",
    '\'; DROP TABLE events; -- " onmouseover=alert(1) x="',
    "__proto__ constructor toString </script><script>alert(1)//",
]
