import jinja2
import markupsafe._speedups


def test_text_is_escaped_by_the_compiled_module():
    template = jinja2.Environment(autoescape=True).from_string("<p>{{ text }}</p>")
    assert template.render(text="a < b") == "<p>a &lt; b</p>"
    assert markupsafe.escape.__module__ == markupsafe._speedups.__name__
