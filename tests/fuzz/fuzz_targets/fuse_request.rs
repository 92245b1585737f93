//! Fuzzes FUSE requests to the devices that serve files.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    cofferdam_fuzz::devices::fuse_request(bytes);
});
