use super::*;

const HUNG: &str = "its machine hung";

fn plan(names: &[&str]) -> Plan {
    Plan::new(names.iter().map(|&name| name.to_owned()))
}

fn began(test: &str) -> Event {
    Event::Began { test: test.to_owned() }
}

fn passed(test: &str) -> Event {
    Event::Passed { test: test.to_owned(), seconds: 1 }
}

fn failed(test: &str) -> Event {
    Event::Failed { test: test.to_owned(), seconds: 1 }
}

/// A machine with these events, after which it ends.
fn machine(plan: &mut Plan, expected: &[&str], events: &[Event], reason: &str) {
    assert_eq!(plan.next_machine().unwrap(), expected);
    for event in events {
        assert!(plan.see(event), "{event}");
    }
    plan.machine_ended(reason);
}

#[test]
fn one_machine_is_enough_when_all_pass() {
    let mut plan = plan(&["a", "b"]);
    machine(&mut plan, &["a", "b"], &[began("a"), began("b"), passed("b"), passed("a")], "it ended");
    assert_eq!(plan.next_machine(), None);
    assert!(plan.passed());
    assert_eq!(plan.summary("X 1", 7), "2 whole-system tests with X 1, 1 machine, 0 retries, 7 s: all passed");
}

#[test]
fn a_fresh_machine_goes_on_and_tries_the_hung_test_last() {
    let mut plan = plan(&["a", "b", "c"]);
    machine(&mut plan, &["a", "b", "c"], &[began("a"), passed("a"), began("b")], HUNG);
    assert!(!plan.passed());
    machine(&mut plan, &["c", "b"], &[began("c"), passed("c"), began("b"), passed("b")], "it ended");
    assert_eq!(plan.next_machine(), None);
    assert!(plan.passed());
    let summary = plan.summary("X 1", 7);
    let expected = "passed when tried again: b (its machine hung, then passed)\n\
                    3 whole-system tests with X 1, 2 machines, 1 retry, 7 s: all passed";
    assert_eq!(summary, expected);
}

#[test]
fn the_third_setback_of_a_test_is_its_failure() {
    let mut plan = plan(&["a", "b"]);
    machine(&mut plan, &["a", "b"], &[began("a"), failed("a"), began("b"), passed("b")], "it ended");
    machine(&mut plan, &["a"], &[began("a")], HUNG);
    machine(&mut plan, &["a"], &[began("a"), failed("a")], "it ended");
    assert_eq!(plan.next_machine(), None);
    assert!(!plan.passed());
    let summary = plan.summary("X 1", 7);
    let expected = "FAILED: a (failed, then its machine hung, then failed)\n\
                    2 whole-system tests with X 1, 3 machines, 2 retries, 7 s: 1 failed";
    assert_eq!(summary, expected);
}

#[test]
fn all_tests_that_run_when_a_machine_hangs_use_up_a_try() {
    let mut plan = plan(&["a", "b", "c"]);
    for _ in 0..TRIES {
        machine(&mut plan, &["a", "b", "c"][..], &[began("a"), began("b"), began("c")], HUNG);
    }
    assert_eq!(plan.next_machine(), None);
    assert!(plan.summary("X 1", 7).ends_with("3 machines, 6 retries, 7 s: 3 failed"));
}

#[test]
fn machines_in_which_no_test_begins_are_given_up() {
    let mut plan = plan(&["a", "b"]);
    machine(&mut plan, &["a", "b"], &[], HUNG);
    machine(&mut plan, &["a", "b"], &[], HUNG);
    machine(&mut plan, &["a", "b"], &[began("a"), passed("a")], HUNG);
    for _ in 0..TRIES {
        machine(&mut plan, &["b"], &[], HUNG);
    }
    assert_eq!(plan.next_machine(), None);
    assert!(!plan.passed());
    let expected = "did not run: b\ngave up: 3 machines in a row ended before a test began\n\
                    2 whole-system tests with X 1, 6 machines, 0 retries, 7 s: 0 failed, 1 unfinished";
    assert_eq!(plan.summary("X 1", 7), expected);
}

#[test]
fn giving_up_fails_the_run_and_lists_unfinished_tests() {
    let mut plan = plan(&["a", "b", "c"]);
    machine(&mut plan, &["a", "b", "c"], &[began("a"), failed("a")], "it ended");
    assert!(plan.next_machine().is_some());
    assert!(plan.see(&began("b")));
    plan.give_up("interrupted".to_owned());
    assert_eq!(plan.next_machine(), None);
    assert!(!plan.passed());
    let expected = "not tried again: a (failed)\ndid not end: b\ndid not run: c\ngave up: interrupted\n\
                    3 whole-system tests with X 1, 2 machines, 0 retries, 7 s: 0 failed, 3 unfinished";
    assert_eq!(plan.summary("X 1", 7), expected);
}

#[test]
fn a_test_without_tries_left_does_not_keep_the_plan_going() {
    let mut plan = plan(&["a", "b"]);
    machine(&mut plan, &["a", "b"], &[began("a")], HUNG);
    for _ in 1..TRIES {
        machine(&mut plan, &["b", "a"], &[began("a")], HUNG);
    }
    for _ in 0..TRIES {
        assert_eq!(plan.next_machine().unwrap(), ["b"]);
        assert!(!plan.see(&began("a")));
        plan.machine_ended(HUNG);
    }
    assert_eq!(plan.next_machine(), None);
}

#[test]
fn impossible_events_change_nothing() {
    let mut plan = plan(&["a"]);
    assert!(plan.next_machine().is_some());
    for event in [began("z"), passed("z"), passed("a"), failed("a")] {
        assert!(!plan.see(&event), "{event}");
    }
    assert!(plan.see(&began("a")));
    assert!(!plan.see(&began("a")));
    assert!(plan.see(&passed("a")));
    for event in [began("a"), passed("a"), failed("a")] {
        assert!(!plan.see(&event), "{event}");
    }
    assert!(plan.passed());
}
