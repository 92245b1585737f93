import { chunk, range, sum } from "./node_modules/lodash-es/lodash.js";
import { strictEqual } from "node:assert";

strictEqual(sum(range(101)), 5050);
strictEqual(chunk([1, 2, 3], 2).length, 2);
