//! Fuzzes the decoder of build requests in binary.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    cofferdam_fuzz::host::request(bytes);
});
