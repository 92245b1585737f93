use proptest::prelude::*;

use super::*;

const MIB: u64 = 1 << 20;
const MINUTE: Duration = Duration::from_secs(60);
const NEED: Need = Need { memory_bytes: 100 * MIB, cpus: 1, disk_bytes: 0 };
const BOUNDS: StockBounds = StockBounds { machines: 2, memory_bytes: 1000 * MIB, age: Duration::from_secs(3600) };
const ROOM: Budget = Budget { memory_bytes: 2000 * MIB, cpus: 8, builds: 8 };

type Tested = Stock<char, u32, MachineId>;

/// Boots the next machine, if there is one to boot, and has it ready. Gives its shape.
fn boot(stock: &mut Tested, room: Budget, now: Instant) -> Option<char> {
    let (order, _) = stock.next(room, now)?;
    let mut booted = None;
    stock.add(&order, 1, now, |id| *booted.insert(id));
    assert!(stock.next(room, now).is_none(), "one boots at a time");
    assert!(stock.ready(booted?) && !stock.ready(booted?));
    Some(order.shape)
}

fn fill(stock: &mut Tested, room: Budget, now: Instant) -> String {
    std::iter::from_fn(|| boot(stock, room, now)).take(10).collect()
}

fn counted(shapes: &str, now: Instant) -> Tested {
    let mut stock = Stock::new(BOUNDS);
    shapes.chars().for_each(|shape| stock.count(shape, NEED, now));
    stock
}

#[test]
fn machines_are_shared_out_by_demand() {
    let now = Instant::now();
    for (asked, kept) in [("", ""), ("a", "a"), ("aa", "aa"), ("ab", "ab"), ("aaab", "aa"), ("aaabb", "ab")] {
        let mut stock = counted(asked, now);
        let mut filled: Vec<_> = fill(&mut stock, ROOM, now).chars().collect();
        filled.sort_unstable();
        assert_eq!(filled.iter().collect::<String>(), kept, "{asked}");
    }
}

#[test]
fn a_single_build_keeps_one_machine_for_a_half_life() {
    let now = Instant::now();
    let mut stock = Stock::new(StockBounds { age: 100 * HALF_LIFE, ..BOUNDS });
    stock.count('a', NEED, now);
    assert_eq!(fill(&mut stock, ROOM, now), "a");
    assert_eq!(stock.expire(now + HALF_LIFE - MINUTE).len(), 0);
    let due = stock.due(now + MINUTE).unwrap();
    assert!(due >= now + HALF_LIFE && due <= now + HALF_LIFE + MINUTE);
    assert_eq!(stock.expire(due).len(), 1);
    assert!(stock.next(ROOM, due).is_none() && stock.due(due).is_none());
}

#[test]
fn shapes_in_equal_demand_do_not_drive_each_other_out() {
    let now = Instant::now();
    let mut stock = Stock::new(StockBounds { machines: 1, ..BOUNDS });
    stock.count('a', NEED, now);
    assert_eq!(fill(&mut stock, ROOM, now), "a");
    stock.count('b', NEED, now);
    assert_eq!(fill(&mut stock, ROOM, now), "");
    stock.count('b', NEED, now);
    let (order, displaced) = stock.next(ROOM, now).unwrap();
    assert!(order.shape == 'b' && displaced.is_some());
    assert_eq!(stock.used(), Budget::default());
}

#[test]
fn a_build_takes_a_machine_of_its_shape_and_environment() {
    let now = Instant::now();
    let mut stock = counted("aa", now);
    assert_eq!(fill(&mut stock, ROOM, now), "aa");
    assert!(stock.take('b', 1).is_none() && stock.take('a', 2).is_none());
    let first = stock.take('a', 1).unwrap();
    assert_ne!(stock.take('a', 1), Some(first));
    assert_eq!((stock.take('a', 1), stock.counts()), (None, (0, 0)));
}

#[test]
fn a_machine_that_boots_is_taken_if_none_is_ready() {
    let now = Instant::now();
    let mut stock = counted("aa", now);
    let (order, _) = stock.next(ROOM, now).unwrap();
    stock.add(&order, 1, now, |id| id);
    let taken = stock.take('a', 1).unwrap();
    assert!(!stock.ready(taken) && stock.lost(taken, now).is_none());
    assert!(stock.next(ROOM, now).is_some(), "a machine that was taken is not lost");
}

#[test]
fn machines_give_way_until_a_build_has_room() {
    let now = Instant::now();
    for (left, gone) in [(2, 0), (1, 1), (0, 2)] {
        let mut stock = counted("aaab", now);
        fill(&mut stock, ROOM, now);
        for room in [
            Budget { builds: left, ..ROOM },
            Budget { cpus: left, ..ROOM },
            Budget { memory_bytes: u64::from(left) * 100 * MIB, ..ROOM },
        ] {
            let mut stock = counted("aaab", now);
            fill(&mut stock, ROOM, now);
            assert_eq!(stock.fit_into(room, now).len(), gone, "{room:?}");
            assert!(stock.used().fits(room));
        }
    }
}

#[test]
fn the_least_worthy_machine_gives_way_first() {
    let now = Instant::now();
    let mut stock = counted("aaabb", now);
    fill(&mut stock, ROOM, now);
    stock.fit_into(Budget { builds: 1, ..ROOM }, now);
    assert!(stock.take('b', 1).is_none() && stock.take('a', 1).is_some());
}

#[test]
fn a_lost_machine_is_not_replaced_at_once() {
    let now = Instant::now();
    let mut stock = counted("aa", now);
    let (order, _) = stock.next(ROOM, now).unwrap();
    let mut id = None;
    stock.add(&order, 1, now, |new| *id.insert(new));
    assert_eq!(stock.lost(id.unwrap(), now), id);
    assert!(stock.lost(id.unwrap(), now).is_none(), "it is lost once");
    assert!(stock.next(ROOM, now).is_none());
    assert_eq!(stock.due(now), Some(now + PAUSE));
    assert!(stock.next(ROOM, now + PAUSE).is_some());
}

#[test]
fn machines_leave_when_they_are_old_and_when_the_environment_changes() {
    let now = Instant::now();
    let mut stock = counted("aaaa", now);
    fill(&mut stock, ROOM, now);
    assert!(stock.keep(1).is_empty() && stock.expire(now + BOUNDS.age - MINUTE).is_empty());
    assert_eq!(stock.due(now), Some(now + BOUNDS.age));
    assert_eq!(stock.expire(now + BOUNDS.age).len(), 2);
    fill(&mut stock, ROOM, now + BOUNDS.age);
    assert_eq!((stock.keep(2).len(), stock.clear().len()), (2, 0));
}

#[test]
fn only_so_many_shapes_are_known() {
    let now = Instant::now();
    let mut stock = counted("aa", now);
    for shape in ('\u{100}'..).take(10 * MAX_SHAPES) {
        stock.count(shape, NEED, now);
    }
    assert_eq!(stock.demand.len(), MAX_SHAPES);
    assert_eq!(boot(&mut stock, ROOM, now), Some('a'));
}

#[derive(Debug, Clone)]
enum Step {
    Count(char, u64),
    Next,
    Ready,
    Take(char),
    Lost,
    Room(u32),
    Later(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let shape = prop::sample::select(vec!['a', 'b', 'c']);
    prop_oneof![
        (shape.clone(), 1_u64..600).prop_map(|(shape, memory)| Step::Count(shape, memory)),
        Just(Step::Next),
        Just(Step::Ready),
        shape.prop_map(Step::Take),
        Just(Step::Lost),
        (0_u32..8).prop_map(Step::Room),
        (1_u64..90).prop_map(Step::Later),
    ]
}

proptest! {
    /// Whatever happens, the stock keeps its bounds, every machine leaves it once, and nothing is overdue.
    #[test]
    fn the_stock_keeps_its_bounds(steps in prop::collection::vec(step(), 0..60)) {
        let (mut stock, mut now, mut room) = (Tested::new(BOUNDS), Instant::now(), ROOM);
        let (mut inside, mut latest) = (Vec::new(), None);
        let left = |inside: &mut Vec<MachineId>, gone: &[MachineId]| {
            let before = inside.len();
            inside.retain(|id| !gone.contains(id));
            assert_eq!(inside.len(), before - gone.len());
        };
        for step in steps {
            match step {
                // A shape has one need, which its first build tells.
                Step::Count(shape, memory) => {
                    let need = stock.demand.get(&shape).map_or(Need { memory_bytes: memory * MIB, cpus: 1, disk_bytes: 0 }, |known| known.need);
                    stock.count(shape, need, now);
                }
                Step::Next => {
                    if let Some((order, displaced)) = stock.next(room, now) {
                        left(&mut inside, displaced.as_slice());
                        stock.add(&order, 1, now, |id| *latest.insert(id));
                        inside.extend(latest);
                    }
                }
                Step::Ready => drop(latest.map(|id| stock.ready(id))),
                Step::Take(shape) => left(&mut inside, stock.take(shape, 1).as_slice()),
                Step::Lost => left(&mut inside, latest.and_then(|id| stock.lost(id, now)).as_slice()),
                Step::Room(builds) => {
                    room = Budget { builds, ..ROOM };
                    left(&mut inside, &stock.fit_into(room, now));
                }
                Step::Later(minutes) => now += MINUTE * u32::try_from(minutes).unwrap(),
            }
            left(&mut inside, &stock.expire(now));
            let used = stock.used();
            prop_assert!(used.fits(room) && used.builds <= BOUNDS.machines && used.memory_bytes <= BOUNDS.memory_bytes);
            prop_assert_eq!(inside.len(), stock.machines.len());
            prop_assert!(stock.due(now).is_none_or(|due| due > now));
            prop_assert!(stock.machines.is_empty() || stock.due(now).is_some());
        }
    }
}
