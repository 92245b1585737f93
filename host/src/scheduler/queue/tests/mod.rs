mod model;

use super::*;

const GIB: u64 = 1 << 30;
const BUDGET: Budget = Budget { memory_bytes: 16 * GIB, cpus: 8, builds: 5 };
const BOUNDS: Bounds = Bounds { queued: 40, queued_per_client: 12 };
const WIDE: Bounds = Bounds { queued: 20_000, queued_per_client: 20_000 };
const SMALL: Need = Need { memory_bytes: GIB, cpus: 1, disk_bytes: 0 };
const WHOLE: Need = Need { memory_bytes: 16 * GIB, cpus: 8, disk_bytes: 0 };

fn at(seconds: u64) -> Instant {
    static BASE: std::sync::LazyLock<Instant> = std::sync::LazyLock::new(Instant::now);
    *BASE + Duration::from_secs(seconds)
}

impl<C: Ord + Clone> Queue<C> {
    /// As a client of the usual terms.
    fn put(&mut self, client: C, need: Need) -> Result<Ticket, Refusal> {
        self.push(client, Terms::default(), need)
    }
}

#[test]
fn a_held_queue_starts_nothing_and_keeps_its_order() {
    let mut queue = Queue::new(BUDGET, BOUNDS);
    let [first, second] = [1, 2].map(|client| queue.put(client, SMALL).unwrap());
    queue.hold(true);
    assert_eq!(queue.next(at(0)), None);
    assert_eq!([first, second].map(|ticket| queue.waiting_for(ticket)), [Some(Waiting::Disk); 2]);
    queue.hold(false);
    assert_eq!([queue.next(at(0)), queue.next(at(0))], [Some(first), Some(second)]);
    queue.hold(true);
    assert!(queue.finish(first, at(1)), "a running build ends");
}

/// A machine that a large build has reserved, with the running build in its way and a small one that waits behind it.
fn reserved() -> (Queue<&'static str>, [Ticket; 3]) {
    let mut queue = Queue::new(BUDGET, WIDE);
    let long = queue.put("a", SMALL).unwrap();
    assert_eq!(queue.next(at(0)), Some(long));
    let large = queue.put("a", WHOLE).unwrap();
    let mut overtakers = 0;
    loop {
        let small = queue.put("b", SMALL).unwrap();
        assert_eq!(queue.waiting_for(large), Some(Waiting::Memory));
        if queue.next(at(1)).is_none() {
            // Each costs a fifth of the machine, since five builds may run.
            assert_eq!(overtakers, 5);
            return (queue, [long, large, small]);
        }
        queue.finish(small, at(2));
        overtakers += 1;
    }
}

#[test]
fn small_builds_overtake_until_a_build_has_waited_too_long() {
    let (mut queue, [long, large, small]) = reserved();
    assert_eq!(queue.waiting_for(small), Some(Waiting::Turn));
    assert_eq!(queue.order().collect::<Vec<_>>(), [large, small]);
    queue.finish(long, at(3));
    assert_eq!(queue.next(at(3)), Some(large));
    assert_eq!(queue.next(at(3)), None);
    queue.finish(large, at(4));
    assert_eq!(queue.next(at(4)), Some(small));
}

#[test]
fn a_build_that_is_removed_has_reserved_nothing_any_more() {
    let (mut queue, [_, large, small]) = reserved();
    assert!(queue.remove(large));
    assert_eq!(queue.next(at(3)), Some(small));
}

#[test]
fn a_refusal_names_the_limit_and_when_to_try_again() {
    let mut queue = Queue::new(BUDGET, Bounds { queued: 3, queued_per_client: 2 });
    let error = queue.put('a', Need { memory_bytes: 17 * GIB, cpus: 1, disk_bytes: 0 }).unwrap_err();
    let expected = "the build needs 18253611008 bytes of memory, but all builds together may use only 17179869184";
    assert_eq!(error.to_string(), expected);
    let error = queue.put('a', Need { memory_bytes: GIB, cpus: 9, disk_bytes: 0 }).unwrap_err();
    assert_eq!(error.to_string(), "the build needs 9 CPUs, but all builds together may use only 8");
    let mut running = Vec::new();
    for _ in 0..5 {
        running.push(queue.put('a', SMALL).unwrap());
        assert_eq!(queue.next(at(0)), running.last().copied());
    }
    let waiting = queue.put('a', SMALL).unwrap();
    assert_eq!(queue.waiting_for(waiting), Some(Waiting::Builds));
    queue.put('a', SMALL).unwrap();
    // Nothing has finished: a minute is guessed, and one in five ends after a fifth of it.
    let expected = "the queue is full (queued_per_client is 2); try again in about 12 s";
    assert_eq!(queue.put('a', SMALL).unwrap_err().to_string(), expected);
    queue.finish(running[0], at(100));
    let expected = "the queue is full (queued_per_client is 2); try again in about 25 s";
    assert_eq!(queue.put('a', SMALL).unwrap_err().to_string(), expected);
    queue.put('b', SMALL).unwrap();
    let refusal = queue.put('c', SMALL).unwrap_err();
    assert_eq!(refusal, Refusal::Full { limit: "queued", bound: 3, retry_after: Duration::from_secs(25) });
}

#[test]
fn a_mean_of_durations_follows_and_hints_stay_within_bounds() {
    let mut queue = Queue::new(BUDGET, Bounds { queued: 1, queued_per_client: 1 });
    let mut run = |from, to| {
        let ticket = queue.put((), SMALL).unwrap();
        assert_eq!(queue.next(at(from)), Some(ticket));
        queue.finish(ticket, at(to));
        queue.retry_after(1)
    };
    assert_eq!(run(0, 80), Duration::from_secs(80));
    assert_eq!(run(100, 100), Duration::from_secs(70));
    assert_eq!(run(100, 1_000_000), MAX_RETRY);
    // A clock that goes back is no time.
    for _ in 0..200 {
        run(100, 0);
    }
    assert_eq!(run(100, 0), MIN_RETRY);
}

#[test]
fn ten_thousand_waiting_builds_stay_cheap() {
    let mut queue = Queue::new(BUDGET, WIDE);
    let started = Instant::now();
    for number in 0..10_000_u32 {
        queue.put(number % 100, if number % 7 == 0 { WHOLE } else { SMALL }).unwrap();
        queue.next(at(0));
    }
    let mut running: VecDeque<_> = queue.running.keys().copied().collect();
    while let Some(ticket) = running.pop_front() {
        queue.finish(ticket, at(1));
        while let Some(ticket) = queue.next(at(1)) {
            running.push_back(ticket);
        }
    }
    assert_eq!(queue.order().count(), 0);
    // A hundred times the duration on an idle machine. Scanning all builds for each would take many minutes.
    assert!(started.elapsed() < Duration::from_secs(60), "{:?}", started.elapsed());
}

#[test]
fn builds_of_a_client_that_runs_as_many_as_it_may_hold_nobody_up() {
    let mut queue = Queue::new(BUDGET, WIDE);
    let bounded = Terms { running: Some(1), ..Terms::default() };
    let first = queue.push("bounded", bounded, SMALL).unwrap();
    let waiting: Vec<_> = (0..50).map(|_| queue.push("bounded", bounded, WHOLE).unwrap()).collect();
    assert_eq!((queue.next(at(0)), queue.next(at(0))), (Some(first), None));
    assert_eq!(queue.waiting_for(waiting[0]), Some(Waiting::Tenant { running: 1 }));
    for second in 1..100 {
        let other = queue.put("other", SMALL).unwrap();
        assert_eq!(queue.next(at(second)), Some(other));
        queue.finish(other, at(second + 1));
    }
    queue.finish(first, at(200));
    let other = queue.put("other", SMALL).unwrap();
    assert_eq!(queue.next(at(200)), Some(waiting[0]), "it has had less, and nothing has overtaken it");
    assert_eq!((queue.next(at(200)), queue.waiting_for(other)), (None, Some(Waiting::Memory)));
}

#[test]
fn builds_that_may_take_too_much_of_the_disk_wait_for_those_of_their_client_alone() {
    let mut queue = Queue::new(BUDGET, WIDE);
    let bounded = Terms { disk: Some(100), ..Terms::default() };
    let of = |disk_bytes| Need { disk_bytes, ..SMALL };
    assert_eq!(queue.push("bounded", bounded, of(101)), Err(Refusal::Disk { needed: 101, allowed: 100 }));
    let [first, large, small] = [60, 50, 10].map(|bytes| queue.push("bounded", bounded, of(bytes)).unwrap());
    assert_eq!((queue.next(at(0)), queue.next(at(0))), (Some(first), None), "a client's later builds keep their order");
    let quota = Waiting::Quota { disk_bytes: 60, allowed_bytes: 100 };
    assert_eq!([large, small].map(|ticket| queue.waiting_for(ticket)), [Some(quota), Some(Waiting::Turn)]);
    let other = queue.put("other", of(u64::MAX)).unwrap();
    assert_eq!(queue.next(at(0)), Some(other), "what another client takes of the disk doesn't count");
    assert_eq!(queue.running_of()["bounded"], Load { builds: 1, disk_bytes: 60 });
    // Whoever couldn't have asked for it doesn't take it over.
    assert_eq!(queue.join(large, &"third", Terms { disk: Some(49), ..Terms::default() }), None);
    queue.finish(first, at(1));
    assert_eq!([queue.next(at(1)), queue.next(at(1))], [Some(large), Some(small)]);
    queue.finish(large, at(2));
    queue.finish(small, at(2));
    assert!(!queue.running_of().contains_key("bounded"));
}

#[test]
fn who_joins_a_build_keeps_the_better_of_both_places() {
    let mut queue = Queue::new(BUDGET, Bounds { queued: 40, queued_per_client: 30 });
    let running = queue.put("busy", WHOLE).unwrap();
    assert_eq!(queue.next(at(0)), Some(running));
    let junk: Vec<_> = (0..20).map(|_| queue.put("busy", SMALL).unwrap()).collect();
    let shared = queue.put("busy", SMALL).unwrap();
    assert_eq!(queue.order().last(), Some(shared));
    let moved = queue.join(shared, &"other", Terms::default()).unwrap();
    assert!(
        queue.order().position(|ticket| ticket == moved).unwrap() <= 1,
        "the place that the other would have alone"
    );
    // Somebody with a worse place changes nothing, nor does joining twice.
    assert_eq!(
        (queue.join(moved, &"busy", Terms::default()), queue.join(moved, &"other", Terms::default())),
        (None, None)
    );
    assert_eq!(queue.join(junk[19], &"busy", Terms::default()), None);
    // A client that may have no more builds waiting joins without a place.
    let terms = Terms { queued: Some(1), ..Terms::default() };
    assert_eq!(queue.join(junk[19], &"other", terms), None);
    assert!(matches!(queue.push("other", terms, SMALL), Err(Refusal::Full { bound: 1, .. })));
}

#[test]
fn a_flood_of_builds_that_end_at_once_delays_others_by_no_more_than_its_share() {
    let mut queue = Queue::new(Budget { builds: 1, ..BUDGET }, WIDE);
    let (long, at_once) = (Duration::from_secs(4), Duration::from_micros(1_900));
    let (mut now, mut flood) = (at(0), 0);
    for round in 0..10 {
        let (pushed, own) = (now, queue.put("honest", SMALL).unwrap());
        loop {
            while flood < 200 {
                queue.put("flood", SMALL).unwrap();
                flood += 1;
            }
            let started = queue.next(now).unwrap();
            if started == own {
                break;
            }
            now += at_once;
            queue.finish(started, now);
            flood -= 1;
        }
        let waited = now - pushed;
        assert!(waited <= long + 2 * at_once, "round {round}: {waited:?}");
        now += long;
        queue.finish(own, now);
    }
}

#[test]
fn a_flood_gets_little_time_back_for_the_places_that_stand_empty_between_its_builds() {
    let mut queue = Queue::new(Budget { builds: 2, ..BUDGET }, WIDE);
    let tick = Duration::from_millis(5);
    let (mut now, mut own_since, mut own) = (at(0), 0, None);
    let mut running: Vec<Ticket> = Vec::new();
    for number in 0..4_000 {
        // A build of the flood takes a tick, and its place stands empty for another one.
        let ended = std::mem::take(&mut running);
        for ticket in &ended {
            queue.finish(*ticket, now);
            queue.put("flood", SMALL).unwrap();
        }
        if number == 0 {
            for _ in 0..200 {
                queue.put("flood", SMALL).unwrap();
            }
        }
        match own {
            Some((ticket, true)) if number - own_since == 1_000 => {
                queue.finish(ticket, now);
                own = None;
            }
            Some((_, false)) => assert!(number - own_since < 100, "it has waited since {own_since}"),
            _ => {}
        }
        if own.is_none() {
            own = Some((queue.put("honest", SMALL).unwrap(), false));
            own_since = number;
        }
        if ended.is_empty() {
            while let Some(started) = queue.next(now) {
                match &mut own {
                    Some((ticket, runs)) if *ticket == started => {
                        *runs = true;
                        own_since = number;
                    }
                    _ => running.push(started),
                }
            }
        }
        now += tick;
    }
}
