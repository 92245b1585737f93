//! Fuzzes what the device for paths of the host asks its opener.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    cofferdam_fuzz::devices::paths_request(bytes);
});
