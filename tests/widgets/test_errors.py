"""The box where errors and notices stand."""

from __future__ import annotations

from widgets._errors import Notices
from workbench.errors import StepError


def test_a_workbench_error_is_shown_as_it_reads():
    notices = Notices()
    notices.error("Starting the run", StepError("Prune: ratio is 2."))
    assert notices.text == '<div role="alert"><b>Starting the run failed.</b> Prune: ratio is 2.</div>'


def test_any_other_error_keeps_its_traceback_for_a_report():
    notices = Notices()
    try:
        {}["missing"]
    except KeyError as error:
        notices.error("Drawing", error)
    assert "KeyError" in notices.text
    assert "<details>" in notices.text
    assert "test_errors.py" in notices.text


def test_what_an_error_says_is_escaped():
    notices = Notices()
    notices.error("<script>a</script>", StepError("<img src=x onerror=alert(1)>"))
    notices.tell("<b>bold</b>")
    assert "<script>" not in notices.text
    assert "<img" not in notices.text
    assert "&lt;b&gt;bold&lt;/b&gt;" in notices.text


def test_messages_are_dismissed_one_by_one_and_the_newest_is_first():
    notices = Notices()
    for text in ("one", "two"):
        notices.tell(text)
    assert notices.text == '<div role="status">two</div><div role="status">one</div>'
    notices.children[0].children[1].click()
    assert notices.text == '<div role="status">one</div>'


def test_a_message_that_still_stands_is_not_repeated():
    notices = Notices()
    notices.tell("again")
    notices.tell("again")
    assert len(notices.children) == 1


def test_old_messages_give_way():
    notices = Notices()
    for number in range(20):
        notices.tell(str(number))
    assert 1 < len(notices.children) < 10
    assert ">19<" in notices.children[0].children[0].value
