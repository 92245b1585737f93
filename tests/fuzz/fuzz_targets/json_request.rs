//! Fuzzes the decoder of build requests in JSON.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    cofferdam_fuzz::host::json_request(bytes);
});
