// Checks the files of deploy/ against published schemas; prints each fault, exit status 1 if there is one.
//   node check.mjs compose FILE...        the Compose Specification's schema (as dclint carries it)
//   node check.mjs kubernetes FILE...     those of Kubernetes' API (as kubernetes-models carries them)
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import Ajv from "ajv";
import { parse, parseAllDocuments } from "yaml";

const [kind, ...files] = process.argv.slice(2);
let faults = 0;
const fault = (text) => { faults++; console.log(`FAIL ${text}`); };

function composeChecker() {
  const path = createRequire(import.meta.url).resolve("dclint/package.json").replace("package.json", "schemas/compose.schema.json");
  const schema = JSON.parse(readFileSync(path, "utf8"));
  delete schema.$schema; // ajv's default dialect reads it
  const validate = new Ajv({ strict: false, allErrors: true, validateFormats: false }).compile(schema);
  return (file) => {
    if (validate(parse(readFileSync(file, "utf8"), { merge: true }))) return;
    for (const e of validate.errors) fault(`${file}: ${e.instancePath} ${e.message} ${JSON.stringify(e.params)}`);
  };
}

async function checkObjects(file) {
  const objects = parseAllDocuments(readFileSync(file, "utf8")).map((d) => d.toJS()).filter(Boolean);
  if (objects.length === 0) fault(`${file}: no objects`);
  for (const object of objects) {
    const name = `${file}: ${object.kind} ${object.metadata?.name}`;
    try {
      const models = await import(`kubernetes-models/${object.apiVersion}/${object.kind}`);
      new models[object.kind](object).validate();
    } catch (error) {
      fault(`${name}: ${error.message}`);
    }
  }
}

if (kind === "compose") files.forEach(composeChecker());
else for (const file of files) await checkObjects(file);
console.log(`${kind}: ${files.length} files, ${faults} faults`);
process.exit(faults || files.length === 0 ? 1 : 0);
