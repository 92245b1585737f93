//! Fuzzes the decoder of addresses of stores.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    cofferdam_fuzz::castore::address(bytes);
});
