//! What a build writes while it runs.

use std::fmt::Write;

use cofferdam_tests::Cofferdam;

#[test]
fn output_arrives_as_it_is_written_in_order_and_complete() {
    let cofferdam = Cofferdam::new();
    let mut running = cofferdam.build().start_shell(
        "echo early
         sleep 4
         seq 1 400000
         echo between >&2
         sleep 0.5
         echo late; echo 'without a newline' | tr -d '\\n'",
    );
    running.wait_for("early\n");
    assert!(running.is_alive() && !running.stderr_so_far().contains("1\n2\n"), "{}", running.stderr_so_far());
    let ended = running.end().succeeds();

    let mut numbers = String::new();
    for number in 1..=400_000 {
        writeln!(numbers, "{number}").unwrap();
    }
    let log = &ended.stderr;
    assert!(log.replace("between\n", "").contains(&numbers), "{} of {} bytes", log.len(), numbers.len());
    assert!(log.contains("between\n") && log.ends_with("late\nwithout a newline"));
    assert!(ended.json()["outputs"].as_array().is_none_or(Vec::is_empty), "{ended}");
}
