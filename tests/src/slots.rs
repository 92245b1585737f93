//! Limits the number of VMs that run at a time. Each holds a locked file, so the limit covers all threads and test programs.

use std::{
    fs::{self, File, TryLockError},
    path::PathBuf,
    sync::LazyLock,
    thread,
    time::Duration,
};

/// VMs at a time. Each emulated one keeps a core busy.
pub static COUNT: LazyLock<usize> =
    LazyLock::new(|| thread::available_parallelism().map_or(2, usize::from).clamp(2, 3));

static DIRECTORY: LazyLock<PathBuf> = LazyLock::new(|| {
    let directory = cofferdam_images::cache_dir().join("test-slots");
    fs::create_dir_all(&directory).expect("the cache directory can be written");
    directory
});

/// Room for VMs until dropped.
#[derive(Debug)]
pub struct Slots(#[expect(dead_code, reason = "the locks are held by being there")] Vec<File>);

/// Waits for room for one VM.
pub fn take_one() -> Slots {
    Slots(take(1))
}

/// Waits for room for so many VMs, or for all.
pub fn take_some(count: usize) -> Slots {
    Slots(take(count.min(*COUNT)))
}

/// Waits until no other VM runs.
pub fn take_all() -> Slots {
    Slots(take(*COUNT))
}

/// The first to wait holds the gate, so that a test which needs all slots gets them in the end.
fn take(wanted: usize) -> Vec<File> {
    let open = |name: &str| File::create(DIRECTORY.join(name)).expect("the cache directory can be written");
    let gate = open("gate");
    gate.lock().expect("files can be locked");
    let mut taken = Vec::with_capacity(wanted);
    let mut free: Vec<File> = (0..*COUNT).map(|number| open(&number.to_string())).collect();
    while taken.len() < wanted {
        let mut busy = Vec::new();
        for slot in free {
            match slot.try_lock() {
                Ok(()) if taken.len() < wanted => taken.push(slot),
                Ok(()) | Err(TryLockError::WouldBlock) => busy.push(slot),
                Err(TryLockError::Error(error)) => panic!("a slot can't be locked: {error}"),
            }
        }
        free = busy.into_iter().inspect(|slot| drop(slot.unlock())).collect();
        if taken.len() < wanted {
            thread::sleep(Duration::from_millis(20));
        }
    }
    taken
}
