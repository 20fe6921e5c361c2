// transformers.js in node: the folder as it is, no subfolder, nothing from the network.
import path from "node:path";
import { AutoModelForCausalLM, AutoTokenizer, env, Tensor } from "@huggingface/transformers";

const folder = path.resolve(process.argv[2]);
const request = JSON.parse(process.argv[3]);
env.allowRemoteModels = false;
env.localModelPath = path.dirname(folder);
const name = path.basename(folder);
const model = await AutoModelForCausalLM.from_pretrained(name, { subfolder: "", dtype: "fp32", device: "cpu" });
const row = (values) => new Tensor("int64", BigInt64Array.from(values.map(BigInt)), [1, values.length]);
let inputs;
if (typeof request.prompt === "string") {
  const tokenizer = await AutoTokenizer.from_pretrained(name);
  inputs = tokenizer(request.prompt);
} else {
  inputs = { input_ids: row(request.prompt), attention_mask: row(request.prompt.map(() => 1)) };
}
const output = await model.generate({ ...inputs, max_new_tokens: request.new_tokens, do_sample: false });
const prompt = inputs.input_ids.tolist()[0].map(Number);
const tokens = output.tolist()[0].map(Number).slice(prompt.length);
console.log(JSON.stringify({ prompt, tokens }));
