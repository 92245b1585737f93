//! Loads the kernel's modules, as guest-init does; with the minimal kernel there are none.

use std::{fs, fs::File, os::fd::AsRawFd, path::Path};

unsafe extern "C" {
    fn syscall(number: i64, ...) -> i64;
}

const FINIT_MODULE: i64 = 313;

pub fn load() {
    let orders = ["/modules.order", "/scratch.order", "/network.order"];
    let orders = orders.map(|order| fs::read_to_string(order).unwrap_or_default());
    for module in orders.iter().flat_map(|order| order.lines()) {
        let file = File::open(Path::new("/lib").join(module)).unwrap();
        // SAFETY: an open file and an empty string. What is there already may be refused.
        unsafe { syscall(FINIT_MODULE, file.as_raw_fd(), c"".as_ptr(), 0) };
    }
}
