use super::*;

/// How many builds wait for another one's end, as the metrics say.
async fn waiting(scheduler: &Scheduler) -> i64 {
    // What was asked before has been counted when the event loop answers.
    scheduler.answers().await;
    scheduler.backend.metrics.gauges(&["builds"]).waiting[0].1
}

#[tokio::test]
async fn builds_are_counted_when_they_come_to_wait_and_when_they_no_longer_do() {
    let dir = tempfile::tempdir().unwrap();
    let budget = Budget { memory_bytes: 1 << 40, cpus: 64, builds: 1 };
    let settings = SchedulerSettings { budget, ..settings(Reuse::Off) };
    let scheduler = Scheduler::start(backend(dir.path()), settings, CancellationToken::new()).0;
    let mut builds = Vec::new();
    // The first one runs, and never ends by itself.
    for expected in 0..4 {
        builds.push(active(&scheduler, submission(&OPERATOR, &[])).await);
        assert_eq!(waiting(&scheduler).await, expected);
    }
    let waiting_one = builds.pop().unwrap();
    let running_one = builds.remove(0);
    for (ended, expected) in [(waiting_one, 2), (running_one, 1)] {
        drop(ended);
        timeout(LONG, async { while waiting(&scheduler).await != expected {} }).await.unwrap();
    }
}
