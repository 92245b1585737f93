//! Fuzzes the decoder of the message around a build request.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    cofferdam_fuzz::host::build_message(bytes);
});
